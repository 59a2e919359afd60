"""Configurations: make, list, get, replace, delete; and what can be configured."""

from __future__ import annotations

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import Checked, ConfigurationDeleted, Configured, ModelTypeList
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.operations import Flag, describes
from llmkit.engines.base import does_not_fit
from llmkit.errors import (
    LOAD_ERRORS,
    ConfigurationExists,
    ConfigurationNotFound,
    ConfigurationReadOnly,
    DiskFull,
    DoesNotFit,
    ModelIsLoaded,
    ModelLiveElsewhere,
    RefusedByOperator,
    walk,
)
from llmkit.schemas import Configuration, ModelConfigRequest, StoredConfigRequest

DRY_RUN = Flag("dry_run", "Only check it, and say what a load would take.")
RELOAD = Flag("reload", "Load a loaded model again where its engine must start anew for the change.")
UNLOAD = Flag("unload", "Unload the model first, if it is loaded.")


class ConfigureModelHandler(LLMHandler):
    """``POST /llm/configure_model/``."""

    @describes(
        answer=Configured | Checked,
        body=ModelConfigRequest,
        query=(DRY_RUN,),
        errors=(ConfigurationExists, ModelLiveElsewhere, RefusedByOperator, *walk(DoesNotFit), DiskFull),
    )
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self) -> None:
        """Store a new configuration and answer its ``config_id``, or only check it."""
        registry = await self.registry()
        dry_run = self.flag(DRY_RUN)
        request = await self.read_body(ModelConfigRequest)
        if dry_run:
            self.answer(Checked(plan=await registry.check(request, by=self.person)))
            return
        configuration = await registry.configure(request, self.person)
        self.answer(Configured(config_id=configuration.config_id))


class ConfigurationsHandler(LLMHandler):
    """``GET /llm/configurations/``."""

    _track_activity = False

    @describes(answer=list[Configuration])
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List every configuration."""
        registry = await self.registry()
        self.answer([configuration.to_wire() for configuration in registry.configurations()])


class ConfigurationHandler(LLMHandler):
    """``/llm/configuration/{config_id}``."""

    _track_activity = False

    @describes(answer=Configuration, errors=(ConfigurationNotFound,))
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, config_id: str) -> None:
        """Answer one configuration."""
        registry = await self.registry()
        self.answer(registry.configuration(config_id).to_wire())

    @describes(
        answer=Configuration | Checked,
        body=StoredConfigRequest,
        query=(RELOAD, DRY_RUN),
        errors=(ConfigurationNotFound, ConfigurationReadOnly, ModelIsLoaded, *LOAD_ERRORS),
    )
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def put(self, config_id: str) -> None:
        """Replace a configuration and answer it, or only check what would replace it."""
        registry = await self.registry()
        registry.configuration(config_id)  # 404 before a complaint about the body
        body = await self.read_body(StoredConfigRequest)
        if body.config_id not in (None, config_id):
            raise does_not_fit([{"path": "config_id", "message": "is not the one in the path"}])
        reload, by = self.flag(RELOAD), self.person
        if self.flag(DRY_RUN):
            self.answer(Checked(plan=await registry.check(body.request(), config_id, reload=reload, by=by)))
            return
        self.answer((await registry.update(config_id, body.request(), reload=reload, by=by)).to_wire())

    @describes(
        answer=ConfigurationDeleted,
        query=(UNLOAD,),
        errors=(ConfigurationNotFound, ConfigurationReadOnly, ModelIsLoaded, ModelLiveElsewhere, DiskFull),
    )
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def delete(self, config_id: str) -> None:
        """Delete a configuration and its key."""
        registry = await self.registry()
        await registry.delete(config_id, unload=self.flag(UNLOAD), by=self.person)
        self.answer(ConfigurationDeleted(detail="Configuration deleted successfully"))


class ModelTypesHandler(LLMHandler):
    """``GET /llm/model_types/``."""

    _track_activity = False

    @describes(answer=ModelTypeList)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Describe every model type."""
        registry = await self.registry()
        self.answer({"model_types": registry.model_types()})
