from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from llmkit.client import connect
from llmkit.client.connection import Connection, Server, parse_url
from llmkit.errors import (
    ConnectError,
    DoesNotFit,
    LLMKitError,
    NotAuthenticated,
    ParameterForbidden,
    ServerNotFound,
    TimedOut,
)


@pytest.mark.parametrize(
    ("text", "url", "token"),
    [
        ("http://localhost:8888", "http://localhost:8888/", None),
        ("http://localhost:8888/?token=abc", "http://localhost:8888/", "abc"),
        ("http://127.0.0.1:8888/lab?token=abc", "http://127.0.0.1:8888/", "abc"),
        ("http://127.0.0.1:8888/lab/tree/work/a.ipynb", "http://127.0.0.1:8888/", None),
        ("http://127.0.0.1:8888/tree", "http://127.0.0.1:8888/", None),
        ("http://127.0.0.1:8888/llm/health", "http://127.0.0.1:8888/", None),
        ("https://hub.example.org/user/ada/lab", "https://hub.example.org/user/ada/", None),
        ("https://hub.example.org/user/ada@b/", "https://hub.example.org/user/ada@b/", None),
        (" http://127.0.0.1:8888/a%40b ", "http://127.0.0.1:8888/a%40b/", None),
        ("http://0.0.0.0:8888/", "http://127.0.0.1:8888/", None),
        ("http://[::]:8888/", "http://127.0.0.1:8888/", None),
        ("http://[::1]:8888/", "http://[::1]:8888/", None),
        ("http://me:secret@localhost:8888/", "http://localhost:8888/", None),
    ],
)
def test_an_address_is_taken_apart_also_as_copied_from_a_browser(text: str, url: str, token: str | None) -> None:
    assert parse_url(text) == (url, token)


@pytest.mark.parametrize(
    "text", ["", "localhost:8888", "ftp://localhost/", "http://", "http://localhost:x/", "http://[/"]
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ServerNotFound, match="http://localhost:8888/"):
        parse_url(text)


def test_a_refused_address_does_not_repeat_its_token() -> None:
    with pytest.raises(ServerNotFound) as raised:
        parse_url("localhost:8888/?token=canary")
    assert "canary" not in str(raised.value)


def test_the_token_is_in_the_header_and_in_no_representation(fake: Any) -> None:
    server = Server(fake.url, "canary")
    client = connect(fake.url, "canary")
    assert client.health().api_version == "1"
    assert fake.asked[-1].headers["Authorization"] == "token canary"
    assert "canary" not in repr(server) + repr(client) + fake.asked[-1].path
    client.close()


def test_the_servers_words_come_back_as_the_class_that_says_them(fake: Any) -> None:
    told = DoesNotFit("model_kwargs.tmeperature: no such", hint="Look.", param="x", details={"fields": [{"path": "x"}]})
    fake.replies["GET", "/llm/models/"] = (422, told.to_wire())
    with connect(fake.url) as client, pytest.raises(DoesNotFit) as raised:
        client.models()
    assert (raised.value.message, raised.value.hint, raised.value.param, raised.value.details) == (
        told.message,
        "Look.",
        "x",
        {"fields": [{"path": "x"}]},
    )


def test_an_answer_that_is_no_json_is_an_error_in_words(fake: Any) -> None:
    fake.replies["GET", "/llm/models/"] = (200, "<html>Please log in</html>")
    with connect(fake.url) as client, pytest.raises(ConnectError, match="no JSON"):
        client.models()


def test_a_page_that_is_no_error_of_ours_keeps_its_status(fake: Any) -> None:
    fake.replies["GET", "/llm/models/"] = (502, "<html>Bad Gateway</html>")
    with connect(fake.url) as client, pytest.raises(LLMKitError, match="502") as raised:
        client.models()
    assert raised.value.status == 502


def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else(fake: Any) -> None:
    fake.replies["GET", "/llm/models/"] = (302, "", {"Location": fake.url + "elsewhere"})
    with connect(fake.url, "secret") as client, pytest.raises(NotAuthenticated, match="login"):
        client.models()
    assert not any(asked.path == "/elsewhere" for asked in fake.asked)


def test_a_server_that_is_gone_says_so() -> None:
    with pytest.raises(ServerNotFound, match="does not answer"):
        connect("http://127.0.0.1:9/")


def test_a_server_that_takes_too_long_is_an_error_of_its_own() -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    connection = Connection(Server("http://127.0.0.1:9/"))
    connection._http = httpx.Client(transport=httpx.MockTransport(slow), base_url="http://127.0.0.1:9/")
    with pytest.raises(TimedOut, match="did not answer in time"):
        connection.call("GET", "llm/models/")


def test_a_kept_alive_connection_that_the_server_closed_costs_nobody_an_error(fake: Any) -> None:
    answers = iter([httpx.RemoteProtocolError("closed"), httpx.Response(200, json={"ok": True})])

    def flaky(request: httpx.Request) -> httpx.Response:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    connection = Connection(Server("http://127.0.0.1:9/"))
    connection._http = httpx.Client(transport=httpx.MockTransport(flaky), base_url="http://127.0.0.1:9/")
    assert connection.call("GET", "llm/models/") == {"ok": True}


def test_a_certificate_of_ones_own_is_trusted_only_when_it_is_named(
    https_fake: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectError, match="LLMKIT_VERIFY"):
        connect(https_fake.url, "secret")
    assert https_fake.asked == []  # nothing was sent to a server that was not trusted
    connect(https_fake.url, verify=str(certificate)).close()
    connect(https_fake.url, verify=False).close()
    monkeypatch.setenv("LLMKIT_VERIFY", str(certificate))
    connect(https_fake.url).close()
    monkeypatch.setenv("LLMKIT_VERIFY", "0")
    connect(https_fake.url).close()


def test_a_certificate_that_cannot_be_read_is_named(https_fake: Any, tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="no readable certificate"):
        connect(https_fake.url, verify=str(tmp_path / "missing.pem"))


def test_a_proxy_of_the_environment_never_stands_before_a_local_server(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with connect(fake.url) as client:
        assert client.health().status == "ok"


@pytest.mark.parametrize(
    "text",
    [
        "ftp://me:canary@host/",
        "ftp://me:ca/na?ry-canary@host/",
        "me:canary@host",
        "http://me:canary@a..b/",
        "localhost:8888/#token=canary",
    ],
)
def test_a_refused_address_does_not_repeat_its_password(text: str) -> None:
    with pytest.raises(ServerNotFound) as raised:
        parse_url(text)
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("host", ["äß..x", "a..b", "a" * 300 + ".example", "-" * 64])
def test_a_host_that_can_have_no_address_is_refused(host: str) -> None:
    with pytest.raises(ServerNotFound, match="no address"):
        parse_url(f"http://{host}/")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ALL_PROXY", "foo://127.0.0.1:9", "no address of a proxy"),
        ("HTTP_PROXY", "foo:bar", "no address of a proxy"),
        ("ALL_PROXY", "http://127.0.0.1:9", "proxy|does not answer"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConnectError, match=said):
        connect("http://nowhere.invalid/")


def test_a_proxy_that_needs_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def client(**_: Any) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(httpx, "Client", client)
    with pytest.raises(ConnectError, match="socksio"):
        connect("http://nowhere.invalid/")


def test_blanks_around_a_token_are_none_of_it_and_what_can_be_no_token_is_said(fake: Any) -> None:
    connect(fake.url, " secret\n").close()
    assert fake.asked[-1].headers["Authorization"] == "token secret"
    for wrong in ("t\u00f6ken", "to\nken"):
        with pytest.raises(NotAuthenticated, match="characters") as raised:
            connect(fake.url, wrong)
        assert wrong not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"stop": {1, 2}}, "inference_kwargs.stop: "),
        ({"temperature": float("nan")}, "inference_kwargs.temperature: nan"),
        ({"messages": [{"content": object()}]}, "inference_kwargs.messages.0.content: "),
        ({"system": "\ud800"}, "inference_kwargs.system: half a character"),
    ],
)
def test_what_is_no_json_is_named_and_nothing_is_sent(fake: Any, given: dict[str, Any], where: str) -> None:
    with connect(fake.url) as client:
        for ask in (client.prompt, lambda *words, **more: next(client.stream(*words, **more))):
            with pytest.raises(DoesNotFit) as raised:
                ask("m", "Hello", **given)
            assert raised.value.message.startswith(where)
    assert not any(asked.method == "POST" for asked in fake.asked)


def test_what_holds_itself_or_has_no_bottom_is_no_json(fake: Any) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with connect(fake.url) as client:
        for value in (circle, deep):
            with pytest.raises(DoesNotFit, match="nested too deeply"):
                client.prompt("m", "Hello", x=value)


def test_a_key_goes_with_no_prompt(fake: Any) -> None:
    with connect(fake.url) as client:
        for ask in (client.prompt, client.stream):
            with pytest.raises(ParameterForbidden, match="api_key") as raised:
                ask("m", "Hello", api_key="sk-canary")
            assert "canary" not in str(raised.value)
    assert not any(asked.method == "POST" for asked in fake.asked)
