"""Models: load, unload, and their live state."""

from __future__ import annotations

from http import HTTPStatus

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler

MAX_DRAIN_SECONDS = 3600.0


class LoadModelHandler(LLMHandler):
    """``POST /llm/load_model/{config_id}``."""

    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self, config_id: str) -> None:
        """Load a model, or say what that would take; a client that leaves does not end the load."""
        registry = await self.registry()
        wait = self.flag("wait", default=True)
        force = self.flag("force", default=False)
        if self.flag("dry_run", default=False):
            self.answer(await registry.plan(config_id))
            return
        model = await registry.load(config_id, wait=wait, force=force)
        if not wait:
            self.answer(model, HTTPStatus.ACCEPTED)
            return
        self.answer(
            {
                "message": "Model loaded successfully",
                "model_id": model.model_id,
                "load_seconds": model.load_seconds,
            }
        )


class UnloadModelHandler(LLMHandler):
    """``POST /llm/unload_model/{model_id}``."""

    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self, model_id: str) -> None:
        """Unload a model and say what was freed."""
        registry = await self.registry()
        drain = self.seconds("drain", default=0.0, most=MAX_DRAIN_SECONDS)
        freed = await registry.unload(model_id, drain=drain)
        self.answer({"message": "Model unloaded successfully", "model_id": model_id, "freed": freed})


class LoadedModelsHandler(LLMHandler):
    """``GET /llm/loaded_models/``."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List the ``model_id`` of every loaded model."""
        registry = await self.registry()
        self.answer(registry.loaded_models())


class ModelsHandler(LLMHandler):
    """``GET /llm/models/``."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer the live state of every model."""
        registry = await self.registry()
        self.answer(registry.snapshot())


class ModelHandler(LLMHandler):
    """``GET /llm/models/{model_id}``."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, model_id: str) -> None:
        """Answer the live state of one model."""
        registry = await self.registry()
        self.answer(registry.model(model_id))
