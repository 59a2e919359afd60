"""The event loop of upstream and load generator: the faster one, if it is there. No contender is given it."""

from __future__ import annotations

import asyncio
import importlib.util


def has_uvloop() -> bool:
    """Say whether the faster loop is installed (vLLM brings it)."""
    return importlib.util.find_spec("uvloop") is not None


def new_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop."""
    if has_uvloop():
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()
