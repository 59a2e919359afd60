"""Talk to the llmkit of a Jupyter server from a kernel or a script."""

from __future__ import annotations

from llmkit.client.async_client import AsyncClient
from llmkit.client.async_streaming import AsyncAnswerStream
from llmkit.client.client import Client
from llmkit.client.discovery import connect
from llmkit.client.events import Watcher
from llmkit.client.results import Answer, Configuration, Model, ModelList, ModelType
from llmkit.client.starting import start
from llmkit.client.streaming import AnswerStream, Piece
from llmkit.client.transfer import ImportedList
from llmkit.client.usage import Usage
from llmkit.tool_keys import NewToolKey, ToolKey

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClient",
    "Client",
    "Configuration",
    "ImportedList",
    "Model",
    "ModelList",
    "ModelType",
    "NewToolKey",
    "Piece",
    "ToolKey",
    "Usage",
    "Watcher",
    "connect",
    "start",
]
