"""R2: a server is open exactly where its operator has switched off both token and XSRF check, and a 403 says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import requests
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer

NO_TOKEN = "--IdentityProvider.token="
NO_XSRF = "--ServerApp.disable_check_xsrf=True"
SERVERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "no token": (NO_TOKEN,),
    "no XSRF check": (NO_XSRF,),
    "open": (NO_TOKEN, NO_XSRF),
}
BODY = {"model_id": "m", "prompt": "What is the capital of France?"}


@dataclass
class Said:
    """What a client was told."""

    status: int
    text: str


@pytest.fixture(scope="module", params=list(SERVERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def running(kind: str) -> Iterator[JupyterServer]:
    """A server of one kind; its operator has declared a model `m`, which the first question loads."""
    with MockUpstream() as upstream:
        kwargs = {"base_url": upstream.base_url}
        declared = {"model_id": "m", "model_name": "gpt-3", "model_type": "openai", "auto_load": True}
        server = JupyterServer(args=SERVERS[kind])
        config = {"LLMKitApp": {"configurations": [{**declared, "model_kwargs": kwargs}]}}
        (server.folder / "config" / "jupyter_llmkit_config.json").write_text(json.dumps(config))
        with server:
            yield server


# -- the four recipes: each with the server's token, or with nothing where that is None ------------------------------


def by_curl(server: JupyterServer, token: str | None) -> Said:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install curl")
    header = ["-H", f"Authorization: token {token}"] if token else []
    command = ["curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code}", "-X", "POST", *header, "-d", json.dumps(BODY)]
    done = subprocess.run([*command, f"{server.url}llm/inference/"], capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return Said(int(status), text)


def by_requests(server: JupyterServer, token: str | None) -> Said:
    headers = {"Authorization": f"token {token}"} if token else {}
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"{server.url}llm/inference/", json=BODY, headers=headers, timeout=60)
    return Said(answer.status_code, answer.text)


def by_openai(server: JupyterServer, token: str | None) -> Said:
    with httpx.Client(trust_env=False) as http:
        client = openai.OpenAI(
            base_url=f"{server.url}llm/v1", api_key=token or "unused", max_retries=0, http_client=http
        )
        try:
            answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": BODY["prompt"]}])
        except openai.APIStatusError as error:
            return Said(error.status_code, error.response.text)
    return Said(200, answer.choices[0].message.content or "")


def by_browser(server: JupyterServer, token: str | None) -> Said:
    """As a page of JupyterLab does: its cookies, and the XSRF token of them in a header."""
    with httpx.Client(trust_env=False, follow_redirects=True) as page:
        page.get(f"{server.url}login", params={"token": token} if token else None)
        headers = {"X-XSRFToken": page.cookies.get("_xsrf", "")} if token else {}
        answer = page.post(f"{server.url}llm/inference/", json=BODY, headers=headers)
    return Said(answer.status_code, answer.text)


RECIPES: dict[str, Callable[[JupyterServer, str | None], Said]] = {
    "curl": by_curl,
    "requests": by_requests,
    "openai": by_openai,
    "browser": by_browser,
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_r02_a_server_is_open_only_without_token_and_without_xsrf_check(
    running: JupyterServer, kind: str, recipe: str
) -> None:
    ask = RECIPES[recipe]
    bare = ask(running, None)
    print(f"\nR2 {kind}, {recipe} without credentials: {bare.status}")
    if kind == "open":
        assert (bare.status, ANSWER in bare.text) == (200, True), bare
        return
    assert bare.status == 403, bare
    error: dict[str, Any] = json.loads(bare.text)["error"]
    assert "Authorization: token" in error["hint"]
    assert "--IdentityProvider.token=''" in error["hint"]
    assert "--ServerApp.disable_check_xsrf=True" in error["hint"]
    assert "_xsrf" not in error["message"]
    if kind != "no token":  # there is none then that could be sent
        whole = ask(running, running.token)
        assert (whole.status, ANSWER in whole.text) == (200, True), whole
