"""llmkit: large language models in Jupyter, one registry for the server, its kernels and every client.

Examples
--------
>>> import llmkit
>>> client = llmkit.connect()
>>> print(client.prompt("demo", "What is the capital of France?"))
The capital of France is Paris.
>>> llmkit.panel()
llmkit panel (run this cell to show it)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmkit._version import __version__

if TYPE_CHECKING:
    from llmkit.client import AsyncClient, Client, connect, start
    from llmkit.errors import LLMKitError
    from llmkit.panel import panel

__all__ = ["AsyncClient", "Client", "LLMKitError", "__version__", "connect", "panel", "start"]

_HOMES = {
    "AsyncClient": "llmkit.client",
    "Client": "llmkit.client",
    "LLMKitError": "llmkit.errors",
    "connect": "llmkit.client",
    "load_ipython_extension": "llmkit.magics",  # what `%load_ext llmkit` calls
    "panel": "llmkit.panel",
    "start": "llmkit.client",
    "unload_ipython_extension": "llmkit.magics",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: `import llmkit` in the server or a script costs next to nothing.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
