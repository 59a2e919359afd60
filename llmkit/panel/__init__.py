"""The panel: every model of the server in a notebook cell. ``llmkit.panel()`` shows it.

``llmkit.panel`` is this module as well as the function of that name, so the module can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from llmkit.client import Client
from llmkit.panel.app import Panel

__all__ = ["Panel", "panel"]


def panel(client: Client | None = None) -> Panel:
    """Show the server's models: configure, load, prompt, unload.

    Parameters
    ----------
    client
        The server; by default the one that `llmkit.connect` finds.

    Returns
    -------
    Panel
        A widget. As the last expression of a cell it is shown.

    Examples
    --------
    >>> import llmkit
    >>> llmkit.panel()
    llmkit panel (run this cell to show it)
    """
    return Panel(client)


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Panel:
        return panel(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
