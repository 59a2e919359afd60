"""The part of the client that says how models and their server are, and loads and unloads them."""

from __future__ import annotations

from collections.abc import Generator

from llmkit.client.connection import Connection, path_to
from llmkit.client.loading import Bar, follow
from llmkit.client.results import Model, ModelList
from llmkit.client.stopping import Stopped
from llmkit.client.streaming import read_events
from llmkit.schemas import Devices, Health, LoadPlan, LogTail, Memory, Snapshot

UNLOAD_SECONDS = 60.0


class Models:
    """The models of one server, as they are now."""

    connection: Connection

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
