"""The part of the client that stores configurations, changes, shares and deletes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.client import keys, transfer
from llmkit.client.connection import path_to
from llmkit.client.models import UNLOAD_SECONDS, Models
from llmkit.client.provenance import KnownConfigurations
from llmkit.client.results import Configuration, ModelType, read_configuration
from llmkit.client.transfer import ImportedList
from llmkit.schemas import OPTIONAL_FIELDS, SERVERS_OWN, LoadPlan


class Configurations(Models):
    """The configurations of one server; each is found by its model."""

    _known: KnownConfigurations

    def configure(
        self,
        /,
        model_id: str,
        model_name: str,
        model_type: str,
        model_kwargs: Mapping[str, Any] | None = None,
        **optional: Any,
    ) -> Configuration:
        """Store a new configuration; one that is equal to the stored one changes nothing.

        Parameters
        ----------
        model_id
            Your unique name for the model.
        model_name
            What the engine calls it: a hub name, a path, or the name at the remote endpoint.
        model_type
            The engine: ``vllm``, ``openai``; see `model_types`.
        model_kwargs
            Engine arguments and generation defaults, flat or nested under ``engine`` and ``generation``.
        **optional
            ``description``, ``auto_load``, ``idle_ttl``, ``restart``, ``max_in_flight``, ``max_queued``, ``prices``,
            ``fallback``.

        Raises
        ------
        ConfigurationExists
            If the ``model_id`` is taken by a different configuration; `update` changes that one.
        DoesNotFit
            If a field is wrong; ``details["fields"]`` names each.

        Examples
        --------
        >>> client.configure("gpt", "gpt-4o-mini", "openai", {"api_key": "env:OPENAI_API_KEY", "temperature": 0})
        Configuration(config_id='...', model_id='gpt', model_name='gpt-4o-mini', model_type='openai', ...)
        """
        body = _configuration(model_id, model_name, model_type, model_kwargs, optional)
        told = self.connection.call("POST", "llm/configure_model/", json=body)
        self._known.forget()
        return self.configuration(told["config_id"])

    def check(
        self,
        /,
        model_id: str,
        model_name: str,
        model_type: str,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        config_id: str | None = None,
        reload: bool = False,
        **optional: Any,
    ) -> LoadPlan | None:
        """Have a configuration checked as `configure` would check it, and store nothing.

        Parameters
        ----------
        config_id
            Of the configuration that it would replace; ``reload`` is then that of `update`.
        model_id, model_name, model_type, model_kwargs, **optional
            As of `configure`.

        Returns
        -------
        LoadPlan or None
            What loading it would take; None if the server can load no model of this type.

        Raises
        ------
        DoesNotFit, ConfigurationExists, ModelIsLoaded
            Or what else `configure` or `update` would raise.

        Examples
        --------
        >>> plan = client.check("small", "llmkit/demo", "vllm", {"max_model_len": 256})
        >>> plan.estimate.total_bytes > 0
        True
        """
        body = _configuration(model_id, model_name, model_type, model_kwargs, optional)
        params = {"dry_run": "true", **({"reload": "true"} if reload else {})}
        if config_id is None:
            told = self.connection.call("POST", "llm/configure_model/", json=body, params=params)
        else:
            told = self.connection.call("PUT", path_to("llm/configuration", config_id), json=body, params=params)
        return LoadPlan.model_validate(told["plan"]) if told["plan"] is not None else None

    def configurations(self) -> list[Configuration]:
        """Give every configuration, oldest first.

        Examples
        --------
        >>> [one.model_id for one in client.configurations()]
        ['demo', 'gpt']
        """
        return [read_configuration(told) for told in self.connection.call("GET", "llm/configurations/")]

    def configuration(self, config_id: str) -> Configuration:
        """Give one configuration, by its ``config_id``.

        Examples
        --------
        >>> model = client.model("demo")
        >>> client.configuration(model.config_id)
        Configuration(config_id='...', model_id='demo', model_name='llmkit/demo', ...)
        """
        return read_configuration(self.connection.call("GET", path_to("llm/configuration", config_id)))

    def update(self, /, model_id: str, *, reload: bool = False, **changes: Any) -> Configuration:
        """Change a configuration.

        Parameters
        ----------
        model_id
            The model.
        reload
            Unload a live model and load it again, where the change asks for that.
        **changes
            The fields to change, each as a whole; None takes an optional one away.

        Raises
        ------
        ModelIsLoaded
            If an engine argument of a live model changes, without ``reload``.

        Examples
        --------
        >>> changed = client.update("demo", model_kwargs={"temperature": 0.2})
        >>> changed.model_kwargs
        {'temperature': 0.2}
        """
        stored = self.configuration(self.model(model_id).config_id)
        body = {k: v for k, v in stored.to_wire().items() if k not in SERVERS_OWN} | changes
        body = {k: v for k, v in body.items() if v is not None or k not in OPTIONAL_FIELDS}
        path = path_to("llm/configuration", stored.config_id)
        params = {"reload": "true"} if reload else None
        told = self.connection.call("PUT", path, json=body, params=params, seconds=UNLOAD_SECONDS)
        self._known.forget()
        return read_configuration(told)

    def set_key(self, model_id: str, key: str | None = None, *, reload: bool = False) -> Configuration:
        """Give a configuration another API key; everything else stays, and the key is never shown again.

        Parameters
        ----------
        model_id
            The model.
        key
            The key, or ``env:NAME`` for a variable of the server. None: you are asked, so that it stands in no cell.
        reload
            Unload a live model and load it again; without that a live model refuses.

        Raises
        ------
        KeyMissing
            If no key is given, or nobody can be asked.
        ModelIsLoaded
            If the model is live, without ``reload``.
        DoesNotFit
            If its type takes no key.

        Examples
        --------
        >>> changed = client.set_key("gpt", reload=True)
        API key of gpt: ········
        """
        given = keys.clean_key(keys.ask_key(model_id) if key is None else key)
        stored = self.configuration(self.model(model_id).config_id)
        return self.update(model_id, reload=reload, model_kwargs=keys.with_key(stored.model_kwargs, given))

    def delete(self, model_id: str | None = None, *, config_id: str | None = None, unload: bool = False) -> None:
        """Delete a configuration and its key.

        Parameters
        ----------
        model_id, config_id
            Either names it.
        unload
            Unload the model first, if it is loaded.

        Raises
        ------
        ModelIsLoaded
            If it is loaded, without ``unload``.

        Examples
        --------
        >>> client.delete("gpt", unload=True)
        """
        if (model_id is None) == (config_id is None):
            raise TypeError("delete() takes a model_id or a config_id")
        if config_id is None:
            config_id = self.model(str(model_id)).config_id
        params = {"unload": "true"} if unload else None
        self.connection.call("DELETE", path_to("llm/configuration", config_id), params=params, seconds=UNLOAD_SECONDS)
        self._known.forget()

    def export_configurations(self, path: str | os.PathLike[str]) -> list[str]:
        """Write every configuration to a JSON file, without keys; names of variables (``env:NAME``) stay.

        Returns
        -------
        list of str
            The ``model_id`` of each configuration whose key was left out.

        Raises
        ------
        OSError
            If the file cannot be written; one that was there stays.

        Examples
        --------
        >>> client.export_configurations("models.json")
        []
        """
        return transfer.export_configurations(self, Path(path))

    def import_configurations(self, path: str | os.PathLike[str], *, replace: bool = False) -> ImportedList:
        """Send the configurations of a file to the server, and say what became of each.

        Parameters
        ----------
        path
            A file of `export_configurations`.
        replace
            Put those of the file in the place of different ones of the same ``model_id``; a key that the server
            has stays, for the same address.

        Raises
        ------
        OSError, DoesNotFit
            If the file cannot be read, or has a mistake; nothing was changed then.

        Examples
        --------
        >>> left_out = client.export_configurations("models.json")
        >>> client.import_configurations("models.json")
        demo  unchanged
        gpt   unchanged
        """
        return transfer.import_configurations(self, Path(path), replace=replace)

    def model_types(self) -> list[ModelType]:
        """Give every model type of the server, with the schemas of its arguments.

        Examples
        --------
        >>> [one.name for one in client.model_types()]
        ['openai', 'vllm']
        """
        told = self.connection.call("GET", "llm/model_types/")
        return [ModelType.model_validate(one) for one in told["model_types"]]


def _configuration(
    model_id: str,
    model_name: str,
    model_type: str,
    model_kwargs: Mapping[str, Any] | None,
    optional: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "model_id": model_id,
        "model_name": model_name,
        "model_type": model_type,
        "model_kwargs": dict(model_kwargs or {}),
        **{name: value for name, value in optional.items() if value is not None},
    }
