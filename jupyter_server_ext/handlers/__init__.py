"""The routes, relative to the server's base URL."""

from __future__ import annotations

from typing import Any

from jupyter_server_ext.handlers.base import UnknownPathHandler
from jupyter_server_ext.handlers.configurations import (
    ConfigurationHandler,
    ConfigurationsHandler,
    ConfigureModelHandler,
    ModelTypesHandler,
)
from jupyter_server_ext.handlers.conversations import ConversationHandler, ConversationsHandler
from jupyter_server_ext.handlers.inference import InferenceHandler, RequestHandler, RequestsHandler
from jupyter_server_ext.handlers.keys import KeyHandler, KeysHandler
from jupyter_server_ext.handlers.models import (
    LoadedModelsHandler,
    LoadModelHandler,
    ModelHandler,
    ModelsHandler,
    UnloadModelHandler,
)
from jupyter_server_ext.handlers.observability import (
    DevicesHandler,
    EngineMetricsHandler,
    HealthHandler,
    LogsHandler,
    OpenAPIHandler,
    UsageHandler,
    UsageTableHandler,
)
from jupyter_server_ext.handlers.openai_api import (
    RELAYED_PATHS,
    OpenAIHandler,
    OpenAIModelHandler,
    OpenAIModelsHandler,
)

# Every path works with and without its trailing slash; what is not here is a JSON 404, never a redirect.
ROUTES: list[tuple[str, type[Any]]] = [
    (rf"/llm/v1/({RELAYED_PATHS})/?", OpenAIHandler),
    (r"/llm/v1/models/?", OpenAIModelsHandler),
    (r"/llm/v1/models/([^/]+)/?", OpenAIModelHandler),
    (r"/llm/configure_model/?", ConfigureModelHandler),
    (r"/llm/configurations/?", ConfigurationsHandler),
    (r"/llm/configuration/([^/]+)/?", ConfigurationHandler),
    (r"/llm/load_model/([^/]+)/?", LoadModelHandler),
    (r"/llm/unload_model/([^/]+)/?", UnloadModelHandler),
    (r"/llm/loaded_models/?", LoadedModelsHandler),
    (r"/llm/inference/?", InferenceHandler),
    (r"/llm/inference/([^/]+)/?", RequestHandler),
    (r"/llm/requests/?", RequestsHandler),
    (r"/llm/conversations/?", ConversationsHandler),
    (r"/llm/conversations/([^/]+)/?", ConversationHandler),
    (r"/llm/keys/?", KeysHandler),
    (r"/llm/keys/([^/]+)/?", KeyHandler),
    (r"/llm/model_types/?", ModelTypesHandler),
    (r"/llm/models/?", ModelsHandler),
    (r"/llm/models/([^/]+)/?", ModelHandler),
    (r"/llm/models/([^/]+)/logs/?", LogsHandler),
    (r"/llm/models/([^/]+)/metrics/?", EngineMetricsHandler),
    (r"/llm/devices/?", DevicesHandler),
    (r"/llm/health/?", HealthHandler),
    (r"/llm/usage/?", UsageHandler),
    (r"/llm/usage\.csv", UsageTableHandler),
    (r"/llm/openapi\.json", OpenAPIHandler),
    (r"/llm(?:/.*)?", UnknownPathHandler),
]
