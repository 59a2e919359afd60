"""The examples of ``/llm/openapi.json`` as a story: each is sent to a real server, one after the other.

``python tests/openapi_story.py`` sends them and writes down what is answered: after a change of what they show.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from aiohttp import web
from benchmarks.processes import EXTENSIONS
from mock_upstream import USAGE, MockUpstream
from support import REPOSITORY, JupyterServer, wait_until

from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.openapi import EXAMPLES, described

CONFIG_ID: Final = "abcd1234-efgh-5678-ijkl-9012mnop3456"
"""As the specification writes it."""
STATE_DIR: Final = "/home/ada/.local/share/jupyter/llmkit"
REQUEST_ID: Final = "my-request"
SAID: Final = "The capital of France is Paris."
WHOLE: Final = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1764028800, "model": "gpt-3"}
ANSWERS: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        **WHOLE,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}],
        "usage": USAGE,
    },
    "/v1/completions": {
        **WHOLE,
        "object": "text_completion",
        "choices": [{"index": 0, "text": " Paris.", "finish_reason": "stop"}],
        "usage": USAGE,
    },
    "/v1/embeddings": {
        "object": "list",
        "model": "gpt-3",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [0.8, 0.6]},
        ],
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    },
    "/v1/responses": {
        "id": "resp_1",
        "object": "response",
        "model": "gpt-3",
        "status": "completed",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAID}]}],
        "usage": {"input_tokens": 8, "output_tokens": 7, "total_tokens": 15},
    },
    "/tokenize": {"count": 3, "max_model_len": 512, "tokens": [17, 4, 9], "token_strs": None},
}
A_KEY: Final = "llmkit-..."
_KEY: Final = re.compile(r"llmkit-[A-Za-z0-9]{43}")
PLACES: Final = os.pathsep.join(str(place) for place in (Path(__file__).parent, EXTENSIONS, REPOSITORY))
METRICS: Final = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"


async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
    """Answer as an engine would."""
    if request.path == "/metrics":
        return web.Response(text=METRICS)
    if body.get("stream") or request.path not in ANSWERS:
        return None
    return web.json_response(ANSWERS[request.path])


@contextmanager
def story_server(
    *, extensions: Sequence[str] = (), more_args: Sequence[str] = ()
) -> Iterator[tuple[JupyterServer, MockUpstream]]:
    """Run a server whose endpoint is a mock, and whose `vllm` is an engine within the server."""
    with MockUpstream(models=("gpt-3",)) as upstream:
        upstream.respond = respond
        env = {"OPENAI_BASE_URL": upstream.base_url, "PYTHONPATH": PLACES}
        names = ("jupyter_server_ext", "documented_extension", *extensions)
        args = [*(f"--ServerApp.jpserver_extensions={name}=True" for name in names), *more_args]
        with JupyterServer(args=args, env=env) as server:
            yield server, upstream


class Teller:
    """Sends the examples to a server, one after the other."""

    def __init__(self, server: JupyterServer, upstream: MockUpstream) -> None:
        self._server = server
        self._upstream = upstream
        self._where = {one.id: (one.method, one.path) for one in described(ROUTES)}
        self._config_id = CONFIG_ID

    def send(self, example: dict[str, Any]) -> dict[str, Any]:
        """Send an example; give its status and what was answered, as the document writes it."""
        method, path = self._where[example["operation"]]
        path = path.format(**{k: v.replace(CONFIG_ID, self._config_id) for k, v in example["path"].items()})
        path += f"?{example['query']}" if example["query"] else ""
        if example["operation"] == "delete_request":
            with self._running():
                answer = self._server.request(method, path)
        else:
            answer = self._server.request(method, path, json=example.get("body"))
        text = answer.text
        if example["operation"] == "configure_model" and (made := re.search(r'"config_id":"([^"]+)"', text)):
            self._config_id = made[1]
        if answer.status_code == 202:
            wait_until(lambda: self._server.request("GET", "llm/loaded_models/").json(), "the model is loaded")
        text = text.replace(self._config_id, CONFIG_ID).replace(str(self._server.state_dir), STATE_DIR)
        text = _KEY.sub(A_KEY, text)
        kind = answer.headers["Content-Type"].partition(";")[0]
        told: dict[str, Any] = {"status": answer.status_code}
        if kind == "text/event-stream":
            return {**told, "events": text}
        return {**told, "answer": json.loads(text) if kind == "application/json" else text}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have a request run."""
        self._upstream.never_end("word ", 0.05)
        options = {"stream": True, "request_id": REQUEST_ID}
        body = {"model_id": "example_model", "prompt": "Count.", "inference_kwargs": options}
        headers = {"Authorization": f"token {self._server.token}"}
        url = self._server.url + "llm/inference/"
        with httpx.stream("POST", url, json=body, headers=headers, trust_env=False, timeout=30) as stream:
            assert stream.status_code == 200
            wait_until(lambda: self._upstream.open_streams, "the stream runs")
            self._upstream.respond = respond
            yield
            stream.read()


def main() -> None:
    """Write down what a server answers."""
    story = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    with story_server() as (server, upstream):
        teller = Teller(server, upstream)
        for example in story:
            for name in ("status", "answer", "events"):
                example.pop(name, None)
            example.update(teller.send(example))
    EXAMPLES.write_text(json.dumps(story, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
