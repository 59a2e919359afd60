"""Models: load, unload, and their live state."""

from __future__ import annotations

from http import HTTPStatus

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import Loaded, Unloaded
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.operations import Flag, Seconds, describes
from llmkit.errors import LOAD_ERRORS, ConfigurationNotFound, ModelNotFound
from llmkit.schemas import LoadPlan, Model, Snapshot

WAIT = Flag("wait", "Answer when the model is loaded; if not, at once, with the model as it is then.", default=True)
FORCE = Flag("force", "Make room even if models are busy.")
DRY_RUN = Flag("dry_run", "Load nothing; say what it would take, and from whom.")
DRAIN = Seconds("drain", "Seconds in which running requests may end; after them they are aborted.", 0.0, 3600.0)


class LoadModelHandler(LLMHandler):
    """``POST /llm/load_model/{config_id}``."""

    @describes(
        answer=Loaded | LoadPlan,
        others={HTTPStatus.ACCEPTED: Model},
        query=(WAIT, FORCE, DRY_RUN),
        errors=(ConfigurationNotFound, *LOAD_ERRORS),
    )
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self, config_id: str) -> None:
        """Load a model, or say what that would take; a client that leaves does not end the load."""
        registry = await self.registry()
        wait = self.flag(WAIT)
        force = self.flag(FORCE)
        if self.flag(DRY_RUN):
            self.answer(await registry.plan(config_id))
            return
        model = await registry.load(config_id, wait=wait, force=force, by=self.person)
        if not wait:
            self.answer(model, HTTPStatus.ACCEPTED)
            return
        self.answer(
            Loaded(message="Model loaded successfully", model_id=model.model_id, load_seconds=model.load_seconds)
        )


class UnloadModelHandler(LLMHandler):
    """``POST /llm/unload_model/{model_id}``."""

    @describes(answer=Unloaded, query=(DRAIN,), errors=(ModelNotFound,))
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self, model_id: str) -> None:
        """Unload a model and say what was freed."""
        registry = await self.registry()
        drain = self.seconds(DRAIN)
        freed = await registry.unload(model_id, drain=drain, by=self.person)
        self.answer(Unloaded(message="Model unloaded successfully", model_id=model_id, freed=freed))


class LoadedModelsHandler(LLMHandler):
    """``GET /llm/loaded_models/``."""

    _track_activity = False

    @describes(answer=list[str])
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List the ``model_id`` of every loaded model."""
        registry = await self.registry()
        self.answer(registry.loaded_models())


class ModelsHandler(LLMHandler):
    """``GET /llm/models/``."""

    _track_activity = False

    @describes(answer=Snapshot)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer the live state of every model."""
        registry = await self.registry()
        self.answer(registry.snapshot(self.person))


class ModelHandler(LLMHandler):
    """``GET /llm/models/{model_id}``."""

    _track_activity = False

    @describes(answer=Model, errors=(ModelNotFound,))
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, model_id: str) -> None:
        """Answer the live state of one model."""
        registry = await self.registry()
        self.answer(registry.model(model_id, self.person))
