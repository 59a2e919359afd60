"""The Jupyter server extension of llmkit: handlers and the app, no rules."""

from __future__ import annotations

from typing import Any

from llmkit._version import __version__

__all__ = ["__version__"]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from jupyter_server_ext.app import LLMKitApp  # imported when the server asks, not with the package

    return [{"module": "jupyter_server_ext.app", "app": LLMKitApp}]
