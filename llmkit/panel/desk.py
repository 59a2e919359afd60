"""What the tabs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmkit.client import Client
from llmkit.panel.lane import Lane
from llmkit.panel.widgets import Kit


@dataclass
class Desk:
    """The server, the thread that draws, what widgets are made of, and the ways from one tab to another."""

    client: Client
    lane: Lane
    kit: Kit
    may: frozenset[str]
    """What the user may do with models: ``read``, ``execute`` (prompt), ``write`` (configure, load, unload)."""
    open_configure: Callable[[], None]
    """Show the form."""
    edit: Callable[[str], None]
    """Show the form with the configuration of this ``config_id`` in it."""
    duplicate: Callable[[str], None]
    """Show the form with all of a configuration but its ``model_id`` and its key in it."""
    open_models: Callable[[], None]
    """Show the models."""
    open_prompt: Callable[[str], None]
    """Show the prompt, with this ``model_id`` chosen."""
