"""R1, R2: every route, every method, every way to come with or without credentials, every kind of server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jupyter_server.auth.authorizer import Authorizer

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class DenyAll(Authorizer):
    """Knows who you are and allows nothing."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return False


MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "strict": {"ServerApp": {"allow_unauthenticated_access": False}},
    "open": {"ServerApp": {"disable_check_xsrf": True, "token": ""}},
    "deny all": {"ServerApp": {"authorizer_class": DenyAll}},
}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def jp_server_config(mode: str) -> dict[str, Any]:
    config: dict[str, Any] = {key: dict(value) for key, value in MODES[mode].items()}
    config.setdefault("ServerApp", {})["jpserver_extensions"] = {"jupyter_server_ext": True}
    return config


@pytest.fixture
def routes(app: Any) -> list[str]:
    """Every path under /llm that the live router knows, with an id where it takes one."""

    def patterns(router: Any) -> Iterator[str]:
        for rule in router.rules:
            if hasattr(rule.matcher, "regex"):
                yield rule.matcher.regex.pattern
            if hasattr(rule.target, "rules"):
                yield from patterns(rule.target)

    found = [p for p in patterns(app.serverapp.web_app.default_router) if "/llm" in p and "LLM" not in p]
    paths = []
    for pattern in found:
        path = pattern[pattern.index("/llm") :].removesuffix("$")
        path = path.replace("(?:/.*)?", "/no/such/path").replace("([^/]+)", "some-id").replace("/?", "/")
        choice = re.search(r"\((.*)\)", path)
        paths += [path] if choice is None else [path.replace(choice[0], one) for one in choice[1].split("|")]
    assert len(paths) >= 23
    assert not any("(" in path for path in paths)
    return paths


async def credentials(client: httpx.AsyncClient, base: str, token: str) -> dict[str, dict[str, Any]]:
    """Twelve ways to come, by name; what begins with `good` is enough for everything."""
    await client.get(f"{base}/login", params={"token": token})
    page = await client.get(f"{base}/tree")
    cookies = {**dict(client.cookies), **dict(page.cookies)}
    client.cookies.clear()
    basic = base64.b64encode(f"user:{token}".encode()).decode()
    xsrf = cookies.get("_xsrf", "")
    return {
        "nothing": {},
        "good header": {"headers": {"Authorization": f"token {token}"}},
        "good bearer": {"headers": {"Authorization": f"Bearer {token}"}},
        "good query": {"params": {"token": token}},
        "good cookie and xsrf": {"headers": {"Cookie": _cookie(cookies), "X-XSRFToken": xsrf}},
        "cookie alone": {"headers": {"Cookie": _cookie(cookies), "Origin": "http://evil.example"}},
        "wrong header": {"headers": {"Authorization": "token wrong"}},
        "wrong bearer": {"headers": {"Authorization": f"Bearer {token}x"}},
        "wrong query": {"params": {"token": token[:-1]}},
        "empty token": {"headers": {"Authorization": "token"}},
        "basic": {"headers": {"Authorization": f"Basic {basic}"}},
        "forged cookie": {"headers": {"Cookie": "_xsrf=x; username-localhost=admin", "X-XSRFToken": "x"}},
    }


def _cookie(cookies: dict[str, str]) -> str:
    return "; ".join(f"{name}={value}" for name, value in cookies.items())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
async def test_nobody_gets_in_who_should_not(
    app: Any, routes: list[str], mode: str, jp_http_port: int, jp_base_url: str, jp_serverapp: Any
) -> None:
    token = jp_serverapp.identity_provider.token
    base = f"http://127.0.0.1:{jp_http_port}{jp_base_url.rstrip('/')}"
    checked = 0
    async with httpx.AsyncClient(follow_redirects=False, timeout=30) as client:
        for name, how in (await credentials(client, base, token or "none")).items():
            for path in routes:
                for method in METHODS:
                    client.cookies.clear()  # every way stands alone
                    answer = await client.request(method, base + path, content=b"{}", **how)
                    case = f"{mode}: {method} {path} with {name} -> {answer.status_code} {answer.text[:200]}"
                    checked += 1
                    if method == "OPTIONS":
                        # A browser asks this before it sends credentials; the answer holds nothing.
                        assert answer.status_code in (200, 204, 403), case
                        assert not answer.content or answer.status_code == 403, case
                        continue
                    good = name.startswith("good") or mode == "open"
                    if good and mode != "deny all":
                        assert answer.status_code in (200, 400, 404, 405, 422), case
                    elif mode == "deny all" and name.startswith("good"):
                        assert answer.status_code in (403, 405), case
                    elif name == "cookie alone" and method in ("GET", "HEAD"):
                        assert answer.status_code in (403, 404, 405), case
                    else:
                        assert answer.status_code in (401, 403, 404, 405), case
                        assert answer.status_code != 404 or name == "cookie alone", case
                    if answer.status_code >= 400 and method != "HEAD":
                        assert answer.json()["error"]["code"], case
    print(f"R1 {mode}: {checked} requests, no unexpected answer")


@pytest.mark.parametrize("mode", ["default"])
async def test_the_403_names_the_cure(jp_http_port: int, jp_base_url: str, app: Any, mode: str) -> None:
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{jp_http_port}{jp_base_url}llm/configure_model/"
        body = (await client.post(url, content=json.dumps({}))).json()
    hint = body["error"]["hint"]
    assert "Authorization: token" in hint
    assert "--IdentityProvider.token=''" in hint
    assert "--ServerApp.disable_check_xsrf=True" in hint
    assert "_xsrf" not in body["message"]
