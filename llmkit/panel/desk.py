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
    open_configure: Callable[[], None]
    """Show the form."""
    open_models: Callable[[], None]
    """Show the models."""
    open_prompt: Callable[[str], None]
    """Show the prompt, with this ``model_id`` chosen."""
