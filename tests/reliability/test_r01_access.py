"""R1: every route, every method, every way to come with or without credentials, every kind of server."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from jupyter_server.auth.authorizer import Authorizer

from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import ROUTES
from llmkit.tool_keys import ToolKeyRequest

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
READING = ("GET", "HEAD")
PLACES = {
    "(?:/.*)?": "/no/such/path",
    "([^/]+)": "some-id",
    "/?": "/",
}
"""What stands in a request where a route takes anything."""

Opens = Callable[[str, str], bool]


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


def everything(method: str, path: str) -> bool:
    """Open every route."""
    return True


def reading(method: str, path: str) -> bool:
    """Open what changes nothing: a browser adds a cookie by itself, but no page of another origin knows the XSRF."""
    return method in READING


def asking(method: str, path: str) -> bool:
    """Open what a key for tools is for."""
    if path.startswith("/llm/v1/"):
        return method == ("GET" if path.startswith("/llm/v1/models") else "POST")
    return path.startswith("/llm/inference/") and method == ("DELETE" if path.endswith("/some-id/") else "POST")


def nothing(method: str, path: str) -> bool:
    """Open nothing."""
    return False


@dataclass(frozen=True)
class Credential:
    """One way to come.

    Attributes
    ----------
    headers, params
        What is sent.
    opens
        Which method of which path (below the base URL) it is enough for.
    """

    headers: Mapping[str, str]
    opens: Opens
    params: Mapping[str, str] | None = None


async def credentials(
    client: httpx.AsyncClient, base: str, token: str, key: str, revoked: str
) -> dict[str, Credential]:
    """Give all ways to come, by name; a new one is a line here that says what it opens."""
    await client.get(f"{base}/login", params={"token": token})
    await client.get(f"{base}/tree")
    cookies = dict(client.cookies)
    client.cookies.clear()
    cookie, xsrf = _cookie(cookies), cookies.get("_xsrf", "")
    basic = base64.b64encode(f"user:{token}".encode()).decode()

    def header(value: str, opens: Opens) -> Credential:
        return Credential({"Authorization": value}, opens)

    return {
        "nothing": Credential({}, nothing),
        "token": header(f"token {token}", everything),
        "bearer": header(f"Bearer {token}", everything),
        "scheme in another case": header(f"TOKEN {token}", everything),
        "more spaces": header(f"token   {token}", everything),
        "query": Credential({}, everything, {"token": token}),
        "cookie and xsrf": Credential({"Cookie": cookie, "X-XSRFToken": xsrf}, everything),
        "cookie without xsrf": Credential({"Cookie": cookie}, reading),
        "cookie with another xsrf": Credential({"Cookie": cookie, "X-XSRFToken": xsrf[:-1] + "x"}, reading),
        "cookie from another page": Credential({"Cookie": cookie, "Origin": "http://evil.example"}, nothing),
        "forged cookie": Credential({"Cookie": "_xsrf=x; username-localhost=admin", "X-XSRFToken": "x"}, nothing),
        "wrong token": header("token wrong", nothing),
        "longer token": header(f"Bearer {token}x", nothing),
        "shorter token": Credential({}, nothing, {"token": token[:-1]}),
        "token in another case": header(f"token {token.swapcase()}", nothing),
        "empty token": header("token", nothing),
        "empty query": Credential({}, nothing, {"token": ""}),
        "basic": header(f"Basic {basic}", nothing),
        "token without a scheme": header(token, nothing),
        "token in a header of its own": Credential({"X-API-Key": token}, nothing),
        "tool key": header(f"Bearer {key}", asking),
        "tool key as a token": header(f"token {key}", asking),
        "tool key in the query": Credential({}, nothing, {"token": key}),
        "tool key in another case": header(f"Bearer {key.swapcase()}", nothing),
        "revoked tool key": header(f"Bearer {revoked}", nothing),
    }


async def tool_keys(serverapp: Any) -> tuple[str, str]:
    """Make a key for tools, and one that is revoked."""
    (extension,) = serverapp.extension_manager.extension_apps["jupyter_server_ext"]
    keys = (await extension.ready()).keys
    key, revoked = [(await keys.create(ToolKeyRequest(name=name))).key for name in ("good", "revoked")]
    await keys.revoke("revoked")
    return key, revoked


def _cookie(cookies: dict[str, str]) -> str:
    return "; ".join(f"{name}={value}" for name, value in cookies.items())


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def jp_server_config(mode: str) -> dict[str, Any]:
    config: dict[str, Any] = {key: dict(value) for key, value in MODES[mode].items()}
    config.setdefault("ServerApp", {})["jpserver_extensions"] = {"jupyter_server_ext": True}
    return {**config, "LLMKitApp": {"standby": "off"}}


@pytest.fixture
def routes(jp_serverapp: Any, http_server: Any, jp_base_url: str) -> list[str]:
    """Every path under /llm that the running router knows, with an id where it takes one."""
    (extension,) = jp_serverapp.extension_manager.extension_apps["jupyter_server_ext"]
    assert isinstance(extension, LLMKitApp)

    def patterns(router: Any) -> Iterator[str]:
        for rule in router.rules:
            if hasattr(rule.matcher, "regex"):
                yield rule.matcher.regex.pattern
            if hasattr(rule.target, "rules"):
                yield from patterns(rule.target)

    ours = re.compile(r"/llm(?=[/(])")
    paths = []
    for pattern in patterns(jp_serverapp.web_app.default_router):
        found = ours.search(pattern)
        if found is None:
            continue
        path = pattern[found.start() :].removesuffix("$").replace(r"\.", ".")
        for anything, place in PLACES.items():
            path = path.replace(anything, place)
        choice = re.search(r"\(([^()]*)\)", path)
        paths += [path] if choice is None else [path.replace(choice[0], one) for one in choice[1].split("|")]
    assert len(paths) >= len(ROUTES)
    assert not any(set("()[]?*+\\") & set(path) for path in paths), "a route that this test cannot write as a path"
    return paths


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
async def test_r01_nobody_gets_in_who_should_not(
    routes: list[str], mode: str, jp_http_port: int, jp_base_url: str, jp_serverapp: Any
) -> None:
    token = jp_serverapp.identity_provider.token
    base = f"http://127.0.0.1:{jp_http_port}{jp_base_url.rstrip('/')}"
    statuses: Counter[int] = Counter()
    wrong = []
    async with httpx.AsyncClient(follow_redirects=False, timeout=60, trust_env=False) as client:
        ways = await credentials(client, base, token or "none", *await tool_keys(jp_serverapp))
        for name, way in ways.items():
            for path in routes:
                for method in METHODS:
                    client.cookies.clear()  # every way stands alone
                    answer = await client.request(
                        method, base + path, content=b"{}", headers=dict(way.headers), params=way.params
                    )
                    statuses[answer.status_code] += 1
                    why = complaint(answer, mode, name, is_opened=way.opens(method, path))
                    if why is not None:
                        wrong.append(f"{method} {path} with {name}: {why}: {answer.status_code} {answer.text[:200]}")
    print(
        f"\nR1 {mode}: {len(routes)} routes x {len(METHODS)} methods x {len(ways)} credentials: "
        f"{statuses.total()} answers, {len(wrong)} unexpected; "
        + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    )
    assert len(ways) >= 12
    assert wrong == []


def complaint(answer: httpx.Response, mode: str, name: str, *, is_opened: bool) -> str | None:
    """Say what is wrong with an answer."""
    status, method = answer.status_code, answer.request.method
    if method == "OPTIONS":
        # A browser asks this before it sends credentials; the answer holds nothing.
        return (
            None if status in (401, 403) or (status in (200, 204) and not answer.content) else "more than a preflight"
        )
    if status >= 500:
        return "a failure"
    if status >= 300 and method != "HEAD" and not _is_error(answer):
        return "an error in another form"
    # A key for tools is never more than it is, also where nothing at all opens everything.
    if mode == "open" and name != "cookie from another page" and not is_key(name):
        return "refused, in open mode" if status in (401, 403) else None
    if mode == "deny all" or not is_opened:
        # Tornado refuses a method that it does not have before it looks who comes; a page of another origin is refused
        # as 404 where a cookie would let it in.
        allowed = (401, 403, 405, 404) if name == "cookie from another page" else (401, 403, 405)
        return None if status in allowed or (mode == "open" and not is_key(name)) else "not refused"
    return "refused" if status in (401, 403) else None


def is_key(name: str) -> bool:
    """Say whether a way to come is a key for tools that has the form of one."""
    return "tool key" in name and "another case" not in name


def _is_error(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return False
