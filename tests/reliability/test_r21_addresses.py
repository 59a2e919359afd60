"""R21: metadata services and the link-local network are never called, however they are written or resolved."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from raw_upstream import Asked, Peer, RawUpstream, answer
from support import REPOSITORY, JupyterServer

from llmkit.engines.addresses import why_not_called
from llmkit.engines.base import Endpoint
from llmkit.engines.http import EngineHTTP
from llmkit.errors import UpstreamFailed, UpstreamUnreachable

URLS = REPOSITORY / "tests" / "data"
NEVER = URLS.joinpath("urls_never_called.txt").read_text("utf-8").split()
NEVER += [
    "http://169.254.\n169.254/v1",
    "http://169.254.169\t.254/v1",
    " http://169.254.169.254/v1",
    "http://169.254.169.254 /v1",
]
CALLED = URLS.joinpath("urls_called.txt").read_text("utf-8").split()
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:1"], ids=["direct", "proxy"])
def test_r21_no_such_address_can_be_configured(proxy: str | None) -> None:
    env = dict.fromkeys(PROXY_VARIABLES, proxy) if proxy else {}
    taken, refused_wrongly = [], []
    with JupyterServer(env=env) as server:

        def configure(name: str, url: str) -> Any:
            kwargs = {"base_url": url, "api_key": "sk-0123456789abcdef"}
            body = {"model_id": name, "model_name": "m", "model_type": "openai", "model_kwargs": kwargs}
            return server.request("POST", "llm/configure_model/", json=body)

        for number, url in enumerate(NEVER):
            answered = configure(f"never-{number}", url)
            if answered.status_code != 422 or answered.json()["error"]["param"] != "model_kwargs.base_url":
                taken.append((url, answered.status_code, answered.text[:200]))
        for number, url in enumerate(CALLED):
            answered = configure(f"called-{number}", url)
            if answered.status_code != 200:
                refused_wrongly.append((url, answered.text[:200]))
        config_id = configure("called-0", CALLED[0]).json()["config_id"]
        for url in NEVER:
            body = {"model_id": "called-0", "model_name": "m", "model_type": "openai"}
            kwargs = {"base_url": url, "api_key": "sk-0123456789abcdef"}
            changed = server.request("PUT", f"llm/configuration/{config_id}", json={**body, "model_kwargs": kwargs})
            if changed.status_code != 422:
                taken.append((f"PUT {url}", changed.status_code, changed.text[:200]))
        keys = list((server.state_dir / "secrets").iterdir())
    print(
        f"\nR21: {len(NEVER)} URLs x POST, PUT: {len(taken)} taken; "
        f"{len(refused_wrongly)} of {len(CALLED)} others refused"
    )
    assert len(NEVER) >= 80
    assert taken == []
    assert refused_wrongly == []
    assert len(keys) == len(CALLED)  # none was kept for an address that is never called


class NameServer(AbstractResolver):
    """Answers one list of addresses after the other, and the last for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        self.asked += 1
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": 0,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        """Have nothing to close."""


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give every address that a connection is tried to; those that are never called get none in truth."""
    seen: list[str] = []
    real = asyncio.SelectorEventLoop.sock_connect

    async def connect(self: asyncio.SelectorEventLoop, sock: socket.socket, address: Any) -> None:
        seen.append(address[0])
        if not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            raise ConnectionRefusedError(111, "not in a test")
        await real(self, sock, address)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    return seen


def resolve_by(monkeypatch: pytest.MonkeyPatch, names: NameServer) -> None:
    monkeypatch.setattr("llmkit.engines.addresses.DefaultResolver", lambda: names)


async def close_after(asked: Asked, peer: Peer) -> None:
    """Answer, and keep no connection: the next request looks the name up again."""
    await peer.send(answer({"ok": True}, "Connection: close"))
    peer.close()


def named(upstream: RawUpstream, name: str = "rebind.test", **more: Any) -> EngineHTTP:
    port = upstream.base_url.rsplit(":", 1)[1]
    return EngineHTTP(Endpoint(base_url=f"http://{name}:{port}", model="m", api_key="sk-0123456789abcdef", **more))


def forget_names(http: EngineHTTP) -> None:
    connector = http._session.connector
    assert connector is not None
    connector.clear_dns_cache()  # type: ignore[attr-defined]


BAD_ANSWERS = [
    ["169.254.169.254"],
    ["fe80::1"],
    ["fe80::1%lo"],
    ["::ffff:169.254.169.254"],
    ["fd00:ec2::254"],
    ["100.100.100.200"],
    ["0.0.0.0"],
    ["::"],
    ["224.0.0.1"],
    ["64:ff9b::a9fe:a9fe"],
    ["169.254.169.254", "fe80::1"],
]


@pytest.mark.parametrize("bad", BAD_ANSWERS, ids=",".join)
async def test_r21_a_name_that_turns_to_such_an_address_is_not_followed(
    bad: list[str], connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = NameServer(["127.0.0.1"], bad)
    resolve_by(monkeypatch, names)
    async with RawUpstream(close_after) as upstream:
        http = named(upstream, max_retries=2)
        try:
            assert await http.json("GET", "/models") == {"ok": True}
            forget_names(http)
            with pytest.raises(UpstreamUnreachable, match="is never called") as caught:
                await http.json("GET", "/models")
        finally:
            await http.close()
    assert caught.value.param == "model_kwargs.base_url"
    assert names.asked == 2  # and it is not tried again and again
    assert connects == ["127.0.0.1"]


async def test_r21_of_a_machine_with_several_addresses_the_others_are_called(
    connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_by(monkeypatch, NameServer(["fe80::2", "169.254.3.4", "127.0.0.1"]))
    async with RawUpstream(close_after) as upstream:
        http = named(upstream, "ollama.local")
        try:
            assert await http.json("GET", "/models") == {"ok": True}
        finally:
            await http.close()
    assert connects == ["127.0.0.1"]


@pytest.mark.parametrize("url", ["http://169.254.169.254/v1", "http://[fe80::1]/v1", "http://0xa9fea9fe/v1"])
@pytest.mark.parametrize("through_proxy", [False, True])
async def test_r21_what_was_stored_before_the_rule_is_not_called_either(
    url: str, through_proxy: bool, connects: list[str]
) -> None:
    async with RawUpstream(close_after) as proxy:
        http = EngineHTTP(Endpoint(base_url=url, model="m", proxy=proxy.base_url if through_proxy else None))
        try:
            with pytest.raises(UpstreamUnreachable, match="is never called"):
                await http.json("GET", "/models")
        finally:
            await http.close()
        assert proxy.connections == 0
    assert connects == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_r21_a_redirect_there_is_not_followed(status: int, connects: list[str]) -> None:
    async def redirect(asked: Asked, peer: Peer) -> None:
        where = "Location: http://169.254.169.254/latest/meta-data/iam/"
        await peer.send(answer(b"", where, status=f"{status} Found"))

    async with RawUpstream(redirect) as upstream:
        http = EngineHTTP(Endpoint(base_url=upstream.base_url, model="m"))
        try:
            with pytest.raises(UpstreamFailed, match="redirects are not followed"):
                await http.json("GET", "/models")
        finally:
            await http.close()
    assert set(connects) == {"127.0.0.1"}


def test_r21_the_rule_holds_for_every_address_of_the_link_local_networks() -> None:
    assert all(why_not_called(str(ip)) for ip in list(ipaddress.ip_network("169.254.0.0/16"))[::97])
    assert all(why_not_called(f"fe{high:02x}::{low:x}") for high in range(0x80, 0xC0) for low in (0, 1, 0xFFFF))
