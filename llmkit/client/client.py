"""The synchronous client: one method for each thing that the server does."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmkit.client import keys, transfer
from llmkit.client.connection import Connection, path_to
from llmkit.client.conversations import Conversations
from llmkit.client.loading import Bar, follow
from llmkit.client.provenance import KnownConfigurations, Prompt
from llmkit.client.results import Answer, Configuration, Model, ModelList, ModelType, read_configuration
from llmkit.client.stopping import Stopped
from llmkit.client.streaming import AnswerStream, read_events
from llmkit.client.tables import Tables
from llmkit.client.tool_keys import ToolKeys
from llmkit.client.transfer import ImportedList
from llmkit.errors import LLMKitError
from llmkit.schemas import (
    OPTIONAL_FIELDS,
    SERVERS_OWN,
    Devices,
    Health,
    LoadPlan,
    LogTail,
    Memory,
    RequestList,
    Snapshot,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from llmkit.client.async_client import AsyncClient

UNLOAD_SECONDS = 60.0
PERMISSIONS = frozenset({"read", "write", "execute"})
"""Names of what Jupyter's authorizer is asked for; ``execute`` is to prompt."""


class Client(Tables, Conversations, ToolKeys):
    """Configure, load, prompt and unload the models of one Jupyter server.

    Made by `llmkit.connect`. Threads may share it. Every method raises an `LLMKitError` of the class that fits,
    with the server's words.

    Parameters
    ----------
    connection
        The server; it is closed with the client.

    Examples
    --------
    >>> client = llmkit.connect()
    >>> configuration = client.configure("demo", "llmkit/demo", "vllm")
    >>> client.load("demo")
    <Model demo: loaded>
    >>> print(client.prompt("demo", "What is the capital of France?"))
    The capital of France is Paris.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._known = KnownConfigurations(connection)

    @property
    def url(self) -> str:
        """Base URL of the server.

        Examples
        --------
        >>> client.url
        'http://127.0.0.1:...'
        """
        return self.connection.server.url

    @property
    def shared(self) -> bool:
        """Whether many people share the server, as a service of their JupyterHub.

        Examples
        --------
        >>> client.shared
        False
        """
        return self.connection.server.shared

    @property
    def place(self) -> str:
        """The server in words for people: its address, and whether it is a shared one.

        Examples
        --------
        >>> client.place
        'http://127.0.0.1:...'
        """
        return f"{self.url} (shared)" if self.shared else self.url

    def __repr__(self) -> str:
        return f"<llmkit.Client {self.place}>"

    def close(self) -> None:
        """Close the connections to the server; the models stay as they are.

        Examples
        --------
        >>> client.close()
        """
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def permissions(self) -> frozenset[str]:
        """Say what this user may do here: ``read``, ``execute`` (prompt), ``write`` (configure, load, unload, delete).

        A server that cannot tell is taken to allow everything: whatever is not allowed it refuses all the same.

        Examples
        --------
        >>> sorted(client.permissions())
        ['execute', 'read', 'write']
        """
        params = {"permissions": json.dumps({"llm": sorted(PERMISSIONS)})}
        try:
            told = self.connection.call("GET", "api/me", params=params)
            return PERMISSIONS & frozenset(told["permissions"]["llm"])
        except (LLMKitError, LookupError, TypeError):
            return PERMISSIONS

    # -- configurations ----------------------------------------------------------------------------------------

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

    # -- models ------------------------------------------------------------------------------------------------

    def models(self) -> ModelList:
        """Give every model as it is now.

        Examples
        --------
        >>> client.models()
        model_id  status  model_type    model_name   ...
        demo      loaded  vllm ...      llmkit/demo  ...
        gpt       loaded  openai        gpt-4o-mini
        """
        told = self.connection.call("GET", "llm/models/")
        return ModelList(Model.model_validate(one) for one in told["models"])

    def model(self, model_id: str) -> Model:
        """Give one model as it is now, or raise `ModelNotFound`.

        Examples
        --------
        >>> client.model("demo")
        <Model demo: loaded>
        """
        return Model.model_validate(self.connection.call("GET", path_to("llm/models", model_id)))

    def snapshot(self) -> Snapshot:
        """Give every model with the epoch and revision of the registry.

        Examples
        --------
        >>> snapshot = client.snapshot()
        >>> {model.model_id: model.status for model in snapshot.models}
        {'demo': 'loaded', 'gpt': 'loaded'}
        """
        return Snapshot.model_validate(self.connection.call("GET", "llm/models/"))

    def health(self) -> Health:
        """Give the condition of the server's registry and store.

        Examples
        --------
        >>> health = client.health()
        >>> health.status
        'ok'
        """
        return Health.model_validate(self.connection.call("GET", "llm/health"))

    def devices(self) -> Devices:
        """Give CPU, RAM and GPUs of the server's machine, with the share of every model.

        Examples
        --------
        >>> devices = client.devices()
        >>> devices.ram.total_bytes > 0
        True
        """
        return Devices.model_validate(self.connection.call("GET", "llm/devices"))

    def plan(self, model_id: str) -> LoadPlan:
        """Say what a load would take, whether it fits, and which models would be unloaded for it; changes nothing.

        Examples
        --------
        >>> plan = client.plan("demo")
        >>> plan.estimate.total_bytes > 0
        True
        """
        path = path_to("llm/load_model", self.model(model_id).config_id)
        return LoadPlan.model_validate(self.connection.call("POST", path, params={"dry_run": "true"}))

    def logs(self, model_id: str, tail: int = 200) -> list[str]:
        """Give the last lines of an engine's log; none for a model that runs elsewhere.

        Examples
        --------
        >>> lines = client.logs("demo")
        >>> print(lines[0])
        (APIServer pid=...) INFO ... non-default args: ...
        """
        told = self.connection.call("GET", path_to("llm/models", model_id) + "/logs", params={"tail": tail})
        return LogTail.model_validate(told).lines

    def follow_logs(self, model_id: str, tail: int = 200) -> Generator[str]:
        """Give the last lines of an engine's log, then each new one, until the model is deleted or you stop.

        Parameters
        ----------
        model_id
            The model; it need not be loaded yet.
        tail
            With how many lines to begin.

        Examples
        --------
        >>> for line in client.follow_logs("demo"):
        ...     print(line)
        ...     break
        (APIServer pid=...) INFO ... non-default args: ...
        """
        with self.connection.log_stream(model_id, tail) as response:
            for event in read_events(response):
                yield event["line"]

    def start_loading(self, model_id: str, *, force: bool = False) -> Model:
        """Start to load a model, and return at once; ``force`` is that of `load`.

        Examples
        --------
        >>> freed = client.unload("demo")
        >>> client.start_loading("demo")
        <Model demo: loading...>
        """
        return self._start_loading(self.model(model_id), force=force)

    def _start_loading(self, model: Model, *, force: bool) -> Model:
        path = path_to("llm/load_model", model.config_id)
        params = {"wait": "false", **({"force": "true"} if force else {})}
        return Model.model_validate(self.connection.call("POST", path, params=params))

    def load(self, model_id: str, *, progress: bool = True, force: bool = False) -> Model:
        """Load a model, and return when it is loaded.

        Interrupting cancels a load that this call has started; one of somebody else goes on.

        Parameters
        ----------
        model_id
            The model.
        progress
            Show a progress bar.
        force
            Unload busy models, too, to make room, and try what is not expected to fit.

        Raises
        ------
        LoadFailed, NoRoom, EngineNotInstalled, LoadCancelled
            Or another error that says why it could not be loaded; the engine's last words are its note.

        Examples
        --------
        >>> client.load("demo")
        <Model demo: loaded>
        """
        before = self.model(model_id)
        model = self._start_loading(before, force=force)
        if model.status == "loaded":
            return model
        try:
            with Bar(model_id, visible=progress) as bar:
                return follow(self, model_id, bar.show)
        except KeyboardInterrupt:
            if before.status == "loading":
                raise Stopped(f"Stopped. The load of `{model_id}` goes on: somebody else has started it.") from None
            if self.model(model_id).status == "loading":
                self.unload(model_id)
            raise Stopped(f"Stopped. The load of `{model_id}` is cancelled.") from None

    def unload(self, model_id: str, *, drain: float = 0.0) -> Memory:
        """Unload a model, or cancel its load, and say what was freed.

        Parameters
        ----------
        model_id
            The model.
        drain
            Seconds that running requests get to finish.

        Examples
        --------
        >>> freed = client.unload("demo", drain=5)
        >>> freed.verified
        True
        """
        params = {"drain": drain} if drain else None
        path = path_to("llm/unload_model", model_id)
        told = self.connection.call("POST", path, params=params, seconds=UNLOAD_SECONDS + drain)
        return Memory.model_validate(told.get("freed") or {})

    # -- prompts -----------------------------------------------------------------------------------------------

    def prompt(self, model_id: str, prompt: str, **inference_kwargs: Any) -> Answer:
        """Ask a model and give its answer.

        Interrupting ends the generation on the server.

        Parameters
        ----------
        model_id
            A loaded model.
        prompt
            What to ask.
        **inference_kwargs
            ``system``, ``messages``, ``idle_ttl`` and OpenAI's generation parameters, for example ``temperature``,
            ``max_tokens``.

        Raises
        ------
        ModelNotLoaded
            If it has to be loaded first.

        Examples
        --------
        >>> answer = client.prompt("demo", "What is the capital of France?", temperature=0)
        >>> print(answer)
        The capital of France is Paris.
        """
        body = {"model_id": model_id, "prompt": prompt, "inference_kwargs": inference_kwargs}
        return Prompt(self.connection, self._known, body).ask()

    def stream(self, model_id: str, prompt: str, **inference_kwargs: Any) -> AnswerStream:
        """Ask a model and give its answer as it comes; the parameters are those of `prompt`.

        Examples
        --------
        >>> for piece in client.stream("demo", "What is the capital of France?", max_tokens=50):
        ...     print(piece, end="")
        The capital of France is Paris.
        """
        request_id = str(inference_kwargs.setdefault("request_id", f"req-{uuid.uuid4().hex}"))
        inference_kwargs["stream"] = True
        body = {"model_id": model_id, "prompt": prompt, "inference_kwargs": inference_kwargs}
        return AnswerStream(Prompt(self.connection, self._known, body), request_id)

    def cancel(self, request_id: str) -> None:
        """End a running request, or raise `RequestNotFound`.

        Examples
        --------
        >>> requests = client.requests()
        >>> for one in requests.running:
        ...     client.cancel(one.request_id)
        """
        self.connection.call("DELETE", path_to("llm/inference", request_id))

    def requests(self, limit: int = 100, model_id: str | None = None) -> RequestList:
        """Give the requests that run now, and the last ones that are over.

        Parameters
        ----------
        limit
            So many of those that are over, at most.
        model_id
            Only those of this model.

        Raises
        ------
        ModelNotFound
            If there is no such model.

        Examples
        --------
        >>> answer = client.prompt("demo", "What is the capital of France?")
        >>> requests = client.requests(limit=1)
        >>> [one.outcome for one in requests.recent]
        ['ok']
        """
        params = {"limit": limit, **({"model_id": model_id} if model_id is not None else {})}
        return RequestList.model_validate(self.connection.call("GET", "llm/requests/", params=params))

    # -- other faces -------------------------------------------------------------------------------------------

    def openai(self, **kwargs: Any) -> OpenAI:
        """Give a client of the ``openai`` package that asks the models of this server; ``model`` is a ``model_id``.

        Parameters
        ----------
        **kwargs
            Arguments of ``openai.OpenAI``, for example ``timeout`` (seconds) and ``max_retries``.

        Examples
        --------
        >>> openai = client.openai()
        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = openai.chat.completions.create(model="demo", messages=messages)
        >>> reply.choices[0].message.content
        'The capital of France is Paris.'
        >>> openai.close()
        """
        from openai import OpenAI  # slow to import

        return OpenAI(**self.connection.openai_arguments(kwargs))

    def async_openai(self, **kwargs: Any) -> AsyncOpenAI:
        """Give an ``openai.AsyncOpenAI`` that asks the models of this server; see `openai`.

        Examples
        --------
        >>> openai = client.async_openai()
        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = await openai.chat.completions.create(model="demo", messages=messages)
        >>> reply.choices[0].message.content
        'The capital of France is Paris.'
        >>> await openai.close()
        """
        from openai import AsyncOpenAI  # slow to import

        return AsyncOpenAI(**self.connection.openai_arguments(kwargs, is_async=True))

    def as_async(self) -> AsyncClient:
        """Give the same client for ``await``; both share the connections, and closing one closes the other.

        Examples
        --------
        >>> awaited = client.as_async()
        >>> print(await awaited.prompt("demo", "What is the capital of France?"))
        The capital of France is Paris.
        """
        from llmkit.client.async_client import AsyncClient

        return AsyncClient(self)


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
