"""An upstream that answers with the prompt it was asked, and counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from mock_upstream import MockUpstream, chat_answer


class Echo(MockUpstream):
    """Answers with the prompt itself, unless `script` answers otherwise; counts how often each was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.respond = self._respond
        self.script: Callable[[str, int], Awaitable[web.StreamResponse | str | None]] | None = None
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most = 0

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.path != "/v1/chat/completions":
            return None
        prompt = body["messages"][-1]["content"]
        self.asked[prompt] += 1
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            answer = await self.script(prompt, self.asked[prompt]) if self.script else None
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.json_response(chat_answer(f"to {prompt}" if answer is None else answer))
