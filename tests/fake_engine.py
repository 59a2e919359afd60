"""A program that behaves like ``vllm serve``, without a model: the same processes, socket, log and answers.

.. code-block:: text

    python fake_engine.py [options of its own] serve MODEL --uds=PATH --served-model-name=NAME [any flags]

Three processes, each the child of the one before, as in vLLM: API server, engine core, worker. They have shared
memory and leave files in TMPDIR. Neither core nor worker ends because its parent did. An answer repeats the last
user's words; as in vLLM, a word is a token here.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from aiohttp import web

PR_SET_NAME = 15
PHASES = ("starting", "weights", "warming", "loaded")
LOG = {
    "starting": ["non-default args: {'model': 'fake'}", "Resolved architecture: FakeForCausalLM"],
    "weights": ["Initializing a V1 LLM engine (v0.0.0) with config: fake", "Starting to load model fake..."],
    "warming": ["Loading weights took 0.01 seconds", "CPU KV cache size: 32,768 tokens"],
    "loaded": ["Starting vLLM server on a unix socket"],
}

KV_CACHE_TOO_SMALL = (
    "ValueError: To serve at least one request with the models's max seq len ({wanted}), 2.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (1.0 GiB). Based on the available memory, the estimated "
    "maximum model length is {fits}."
)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--phase-seconds", type=float, default=0.0, help="how long each phase of the start takes")
    parser.add_argument("--die-at", choices=PHASES, help="end at the beginning of this phase")
    parser.add_argument("--die-after", type=float, help="end so many seconds after the start is complete")
    parser.add_argument("--exit-status", type=int, default=1, help="how to end; negative for a signal")
    parser.add_argument("--last-words", default="", help="print this before ending")
    parser.add_argument("--stall-at", choices=PHASES, help="do nothing any more from this phase on")
    parser.add_argument("--ignore-sigterm", action="store_true", help="every process ignores SIGTERM")
    parser.add_argument("--leak", action="store_true", help="a process gets away from its parents, and never ends")
    parser.add_argument("--setsid", action="store_true", help="core and worker leave session and process group")
    parser.add_argument("--kv-cache-tokens", type=int, help="fail as vLLM does if the context is longer")
    parser.add_argument("--tokens-per-second", type=float, default=200.0)
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--version", default="0.0.0")
    parser.add_argument("--answer", help="say this, whatever is asked")
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, default=512)
    return parser.parse_known_args(arguments)[0]


def say(words: str) -> None:
    print(f"(APIServer pid={os.getpid()}) INFO 01-01 00:00:00 [fake.py:1] {words}", flush=True)


# -- processes ---------------------------------------------------------------------------------------------


def start_core(options: argparse.Namespace) -> int:
    """Fork the engine core, which forks the worker."""
    pid = os.fork()
    if pid:
        return pid
    # As vLLM's own processes, which `setproctitle` names; the kernel keeps 15 bytes of it.
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"VLLM::EngineCore", 0, 0, 0)
    if options.setsid:
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_sigterm else signal.SIG_DFL)
    worker = os.fork()
    if not worker and options.setsid:
        os.setsid()
    Path(tempfile.gettempdir(), f"fake_dist_{os.getpid()}").write_text("left behind")
    while True:
        time.sleep(60)


def leak() -> None:
    """Leave a process that has left its session and has lost its parent."""
    if not os.fork():
        os.setsid()
        if not os.fork():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(60)
        os._exit(0)
    os.wait()


def die(options: argparse.Namespace) -> None:
    if options.last_words:
        print(options.last_words, flush=True)
    if options.exit_status < 0:
        os.kill(os.getpid(), -options.exit_status)
    os._exit(options.exit_status)


def reach(phase: str, options: argparse.Namespace) -> None:
    """Go through one phase of the start."""
    if options.die_at == phase:
        die(options)
    for words in LOG[phase]:
        say(words)
    while options.stall_at == phase:
        time.sleep(60)
    if phase != "loaded":
        time.sleep(options.phase_seconds)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reach("starting", options)
    # Starts Python's resource tracker, too. Held, so that every process of the engine has it mapped.
    _held = SharedMemory(f"fake-{os.environ.get('LLMKIT_ENGINE_ID', os.getpid())}", create=True, size=1 << 16)
    core = start_core(options)
    if options.leak:
        leak()
    reach("weights", options)
    room = options.kv_cache_tokens
    if room is not None and options.max_model_len > room:
        options.last_words = KV_CACHE_TOO_SMALL.format(wanted=options.max_model_len, fits=room)
        options.die_at = "warming"
    reach("warming", options)
    web.run_app(
        FakeServer(options, core).app(),
        path=options.uds,
        print=None,
        handle_signals=not options.ignore_sigterm,
        access_log=None,
        shutdown_timeout=0.1,
    )


# -- HTTP --------------------------------------------------------------------------------------------------


class FakeServer:
    """Answers as vLLM does."""

    def __init__(self, options: argparse.Namespace, core: int) -> None:
        self._options = options
        self._core = core
        self._count = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/v1/models", self.models),
                web.post("/tokenize", self.tokenize),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
            ]
        )
        app.on_startup.append(self._started)
        app.on_cleanup.append(self._ended)
        return app

    async def _started(self, _: web.Application) -> None:
        reach("loaded", self._options)
        if self._options.die_after is not None:
            asyncio.get_running_loop().call_later(self._options.die_after, die, self._options)

    async def _ended(self, _: web.Application) -> None:
        os.kill(self._core, signal.SIGTERM)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self._options.version})

    async def models(self, _: web.Request) -> web.Response:
        model = {
            "id": self._options.served_model_name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": self._options.model,
            "max_model_len": self._options.max_model_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body and self._options.no_chat_template:
            return refusal(400, "BadRequestError", "default chat template is no longer allowed")
        words = words_of(body)
        return web.json_response({"count": len(words), "max_model_len": self._options.max_model_len})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self._options.no_chat_template:
            return refusal(400, "BadRequestError", "default chat template is no longer allowed")
        return await self._answer(request, "chat.completion")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, "text_completion")

    async def _answer(self, request: web.Request, kind: str) -> web.StreamResponse:
        body = await request.json()
        name, prompt = self._options.served_model_name, words_of(body)
        if body.get("model") != name:
            return refusal(404, "NotFoundError", f"The model `{body.get('model')}` does not exist.")
        room = self._options.max_model_len - len(prompt)
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if room <= 0 or wanted > room:
            words = f"This model's maximum context length is {self._options.max_model_len} tokens."
            return refusal(400, "BadRequestError", words)
        self._count += 1
        words = repeat(body) if self._options.answer is None else self._options.answer.split()
        cut = words[:wanted] if wanted else words
        reply = Reply(
            kind=kind,
            head={"id": f"fake-{self._count}", "created": int(time.time()), "model": name},
            tokens=cut,
            finish_reason="length" if len(cut) < len(words) else "stop",
            prompt_tokens=len(prompt),
        )
        pause = 1 / self._options.tokens_per_second
        if not body.get("stream"):
            await asyncio.sleep(pause * len(cut))
            return web.json_response(reply.whole())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for frame in reply.frames(usage=bool((body.get("stream_options") or {}).get("include_usage"))):
            await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
            await asyncio.sleep(pause)
        await response.write(b"data: [DONE]\n\n")
        return response


class Reply:
    """One answer, whole or in frames."""

    def __init__(
        self, *, kind: str, head: dict[str, Any], tokens: list[str], finish_reason: str, prompt_tokens: int
    ) -> None:
        self._chat = kind == "chat.completion"
        self._kind = kind
        self._head = head
        self._tokens = tokens
        self._finish_reason = finish_reason
        counts = (prompt_tokens, len(tokens), prompt_tokens + len(tokens))
        self._usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=True))

    def whole(self) -> dict[str, Any]:
        text = " ".join(self._tokens)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self._finish_reason}
        return {**self._head, "object": self._kind, "choices": [choice], "usage": self._usage}

    def frames(self, *, usage: bool) -> list[dict[str, Any]]:
        spaced = [f"{' ' if i else ''}{token}" for i, token in enumerate(self._tokens)]
        if self._chat:
            contents = [{"delta": {"role": "assistant", "content": ""}}]
            contents += [{"delta": {"content": text}} for text in spaced]
            contents += [{"delta": {}}]
        else:
            contents = [*({"text": text} for text in spaced), {"text": ""}]
        last = len(contents) - 1
        frames = [
            self._frame(
                [{"index": 0, **c, "logprobs": None, "finish_reason": self._finish_reason if i == last else None}]
            )
            for i, c in enumerate(contents)
        ]
        return [*frames, {**self._frame([]), "usage": self._usage}] if usage else frames

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def words_of(body: dict[str, Any]) -> list[str]:
    if "messages" in body:
        return " ".join(str(message.get("content") or "") for message in body["messages"]).split()
    prompt = body.get("prompt", "")
    return " ".join(prompt).split() if isinstance(prompt, list) else str(prompt).split()


def repeat(body: dict[str, Any]) -> list[str]:
    users = [m for m in body.get("messages", ()) if m.get("role") == "user"]
    return words_of({"messages": users[-1:]}) if users else words_of(body)


def refusal(status: int, kind: str, message: str) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


if __name__ == "__main__":
    main()
