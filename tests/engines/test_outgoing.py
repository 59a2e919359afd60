"""Proxies and certificates of the server's environment, up to a model that is loaded with them."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from pathlib import Path

import pytest
from raw_upstream import NAME, Certificates, RawUpstream, answer, make_certificates, refusing, replies, tunnel_to

from llmkit.engines.base import EngineContext
from llmkit.engines.http import EngineHTTP
from llmkit.engines.openai import OpenAIEngine, OpenAIEngineType
from llmkit.engines.outgoing import proxy_for, trusted_certificates
from llmkit.errors import UpstreamUnreachable
from llmkit.schemas import Configuration

pytestmark = pytest.mark.timeout(30)

PROXY = "http://proxy.test:3128"
OTHER = "http://other.test:8080"
KEY = "sk-0123456789abcdef"
MODELS = answer({"object": "list", "data": [{"id": "gpt-3"}]})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Give an authority that has nothing to do with the first."""
    return make_certificates(tmp_path_factory.mktemp("others"), "another authority")


# -- which proxy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("https://api.test/v1", {}, None),
        ("https://api.test/v1", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https://api.test/v1", {"https_proxy": PROXY}, PROXY),
        ("https://api.test/v1", {"HTTP_PROXY": PROXY, "http_proxy": PROXY}, None),
        ("http://api.test/v1", {"HTTP_PROXY": PROXY}, PROXY),
        ("http://api.test/v1", {"http_proxy": PROXY}, PROXY),
        ("http://api.test/v1", {"HTTPS_PROXY": PROXY, "https_proxy": PROXY}, None),
        ("HTTPS://API.test/v1", {"HTTPS_PROXY": PROXY}, PROXY),
        ("http://api.test/v1", {"ALL_PROXY": PROXY}, PROXY),
        ("https://api.test/v1", {"all_proxy": PROXY}, PROXY),
        ("https://api.test/v1", {"ALL_PROXY": OTHER, "HTTPS_PROXY": PROXY}, PROXY),
        ("https://api.test/v1", {"all_proxy": OTHER, "HTTPS_PROXY": PROXY}, PROXY),
    ],
)
def test_the_variable_of_the_scheme_names_the_proxy_then_that_of_all(
    url: str, environ: dict[str, str], proxy: str | None
) -> None:
    assert proxy_for(url, environ) == proxy


@pytest.mark.parametrize("name", ["https_proxy", "all_proxy"])
def test_small_letters_count_first(name: str) -> None:
    assert proxy_for("https://api.test", {name: PROXY, name.upper(): OTHER}) == PROXY
    assert proxy_for("https://api.test", {name: "", name.upper(): OTHER}) == OTHER


def test_of_what_is_reached_without_a_proxy_small_letters_count_first() -> None:
    environ = {"https_proxy": PROXY, "no_proxy": "one.test", "NO_PROXY": "two.test"}
    assert proxy_for("https://one.test", environ) is None
    assert proxy_for("https://two.test", environ) == PROXY


def test_an_empty_variable_is_none() -> None:
    assert proxy_for("https://api.test", {"https_proxy": "", "HTTPS_PROXY": "", "ALL_PROXY": ""}) is None


@pytest.mark.parametrize("value", ["proxy.test:3128", "http://proxy.test:3128"])
def test_a_proxy_without_a_scheme_is_spoken_to_in_http(value: str) -> None:
    assert proxy_for("https://api.test", {"https_proxy": value}) == PROXY
    assert proxy_for("http://api.test", {"all_proxy": value}) == PROXY


@pytest.mark.parametrize("kind", ["socks5", "socks5h", "socks4", "ftp"])
@pytest.mark.parametrize("name", ["https_proxy", "ALL_PROXY"])
def test_a_proxy_of_another_kind_is_refused_by_its_kind(kind: str, name: str) -> None:
    environ = {name: f"{kind}://user:secret@proxy.test:1080", "no_proxy": "direct.test"}
    with pytest.raises(UpstreamUnreachable, match=f"A proxy of the kind {kind} cannot be used") as caught:
        proxy_for("https://api.test", environ)
    assert "secret" not in str(caught.value.to_wire())
    assert proxy_for("https://direct.test", environ) is None
    assert proxy_for("https://127.0.0.1", environ) is None


def test_a_name_and_password_of_the_proxy_stay_with_it() -> None:
    environ = {"https_proxy": "user:secret@proxy.test:1"}
    assert proxy_for("https://api.test", environ) == "http://user:secret@proxy.test:1"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "localhost:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_this_machine_itself_is_reached_directly(host: str) -> None:
    environ = {"http_proxy": PROXY, "https_proxy": PROXY, "all_proxy": PROXY}
    assert proxy_for(f"http://{host}/v1", environ) is None
    assert proxy_for(f"https://{host}/v1", environ) is None


@pytest.mark.parametrize("host", ["localhost.test", "notlocalhost", "128.0.0.1", "[::2]", "127.test"])
def test_what_only_looks_like_this_machine_is_not(host: str) -> None:
    assert proxy_for(f"http://{host}/v1", {"http_proxy": PROXY}) == PROXY


@pytest.mark.parametrize(
    ("rules", "host"),
    [
        ("*", "api.test"),
        ("*", "10.1.2.3"),
        ("api.test", "api.test"),
        ("api.test", "API.test"),
        ("API.Test", "api.test"),
        ("api.test", "api.test."),
        ("api.test", "api.test:8443"),
        ("test", "api.test"),
        ("api.test", "a.b.api.test"),
        (".api.test", "a.api.test"),
        (".api.test", "api.test"),
        ("*.api.test", "a.api.test"),
        ("*.api.test", "api.test"),
        ("api.test:8443", "api.test:8443"),
        ("api.test:443", "api.test"),
        (".api.test:8443", "api.test:8443"),
        ("one.test,api.test", "api.test"),
        (" one.test , api.test ,, ", "api.test"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3:8443", "10.1.2.3:8443"),
        ("10.0.0.0/8", "10.1.2.3"),
        ("10.1.2.3/8", "10.200.1.1:8443"),
        ("no network/8,10.0.0.0/8", "10.1.2.3"),
        ("fd00::1", "[fd00::1]"),
        ("FD00::1", "[fd00::1]:8443"),
        ("fd00::/8", "[fd12:3456::1]"),
    ],
)
def test_what_a_rule_names_is_reached_directly(rules: str, host: str) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        assert proxy_for(f"https://{host}/v1", {"https_proxy": PROXY, name: rules}) is None


@pytest.mark.parametrize(
    ("rules", "host"),
    [
        ("", "api.test"),
        (",", "api.test"),
        (".", "api.test"),
        ("api.test:80", "api.test"),
        ("*.", "api.test"),
        ("api.test", "napi.test"),
        (".api.test", "napi.test"),
        ("api.test", "api.test.example"),
        ("a.api.test", "api.test"),
        ("api.test:8443", "api.test"),
        ("api.test:8443", "api.test:443"),
        ("10.1.2.3", "10.1.2.30"),
        ("10.0.0.0/8", "11.0.0.1"),
        ("10.0.0.0/8", "api.test"),
        ("10.0.0.0/8", "[fd00::1]"),
        ("fd00::/8", "10.1.2.3"),
        ("fd00::1", "[fd00::2]"),
        ("no network/8", "api.test"),
    ],
)
def test_what_no_rule_names_is_reached_through_the_proxy(rules: str, host: str) -> None:
    assert proxy_for(f"https://{host}/v1", {"https_proxy": PROXY, "no_proxy": rules}) == PROXY


# -- whose certificates --------------------------------------------------------------------------------------------

ACCEPTED = [
    {"SSL_CERT_FILE": "AUTHORITY"},
    {"SSL_CERT_DIR": "FOLDER"},
    {"REQUESTS_CA_BUNDLE": "AUTHORITY"},
    {"REQUESTS_CA_BUNDLE": "FOLDER"},
    {"CURL_CA_BUNDLE": "AUTHORITY"},
    {"SSL_CERT_FILE": "AUTHORITY", "SSL_CERT_DIR": "OTHER FOLDER"},
    {"SSL_CERT_FILE": "OTHER AUTHORITY", "SSL_CERT_DIR": "FOLDER"},
    {"SSL_CERT_FILE": "AUTHORITY", "SSL_CERT_DIR": "MISSING"},
    {"SSL_CERT_FILE": "AUTHORITY", "REQUESTS_CA_BUNDLE": "MISSING", "CURL_CA_BUNDLE": "MISSING"},
    {"REQUESTS_CA_BUNDLE": "AUTHORITY", "CURL_CA_BUNDLE": "MISSING"},
    {"SSL_CERT_FILE": "", "SSL_CERT_DIR": "", "REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": "AUTHORITY"},
]
REFUSED = [
    {},
    {"SSL_CERT_FILE": ""},
    {"SSL_CERT_FILE": "OTHER AUTHORITY"},
    {"SSL_CERT_DIR": "OTHER FOLDER"},
    {"SSL_CERT_DIR": "EMPTY"},
    {"REQUESTS_CA_BUNDLE": "OTHER AUTHORITY"},
    {"CURL_CA_BUNDLE": "OTHER AUTHORITY"},
    {"SSL_CERT_FILE": "OTHER AUTHORITY", "REQUESTS_CA_BUNDLE": "AUTHORITY"},
    {"SSL_CERT_DIR": "OTHER FOLDER", "CURL_CA_BUNDLE": "AUTHORITY"},
    {"REQUESTS_CA_BUNDLE": "OTHER AUTHORITY", "CURL_CA_BUNDLE": "AUTHORITY"},
]
UNREADABLE = [
    ({"SSL_CERT_FILE": "MISSING"}, "SSL_CERT_FILE"),
    ({"SSL_CERT_DIR": "MISSING"}, "SSL_CERT_DIR"),
    ({"REQUESTS_CA_BUNDLE": "MISSING"}, "REQUESTS_CA_BUNDLE"),
    ({"CURL_CA_BUNDLE": "MISSING"}, "CURL_CA_BUNDLE"),
    ({"SSL_CERT_FILE": "TEXT"}, "SSL_CERT_FILE"),
    ({"SSL_CERT_DIR": "TEXT"}, "SSL_CERT_DIR"),
    ({"REQUESTS_CA_BUNDLE": "TEXT"}, "REQUESTS_CA_BUNDLE"),
    ({"CURL_CA_BUNDLE": "BROKEN"}, "CURL_CA_BUNDLE"),
    ({"SSL_CERT_FILE": "BROKEN", "SSL_CERT_DIR": "FOLDER"}, "SSL_CERT_FILE and SSL_CERT_DIR"),
]


@pytest.fixture
def places(certificates: Certificates, others: Certificates, tmp_path: Path) -> dict[str, str]:
    """Give the paths that the environments of the tests name."""
    for name, text in {"text": "no certificate", "broken": "-----BEGIN CERTIFICATE-----\nAAAA\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    return {
        "": "",
        "AUTHORITY": str(certificates.authority),
        "FOLDER": str(certificates.folder),
        "OTHER AUTHORITY": str(others.authority),
        "OTHER FOLDER": str(others.folder),
        "MISSING": str(tmp_path / "missing"),
        "EMPTY": str(tmp_path / "empty"),
        "TEXT": str(tmp_path / "text"),
        "BROKEN": str(tmp_path / "broken"),
    }


def engine_of(base_url: str, environ: Mapping[str, str], context: EngineContext) -> OpenAIEngine:
    """Make the engine of a model, as a load does."""
    configuration = Configuration(
        config_id="1", model_id="m", model_name="gpt-3", model_type="openai", model_kwargs={"base_url": base_url}
    )
    return OpenAIEngineType(environ).create(configuration, context)


@pytest.fixture
def context(tmp_path: Path) -> EngineContext:
    return EngineContext(tmp_path, tmp_path / "log", KEY, logging.getLogger("test"))


async def start(engine: OpenAIEngine) -> None:
    await engine.start(lambda progress: None)


@pytest.mark.parametrize("named", ACCEPTED, ids=str)
async def test_a_server_of_an_authority_that_is_named_is_accepted(
    named: dict[str, str], places: dict[str, str], certificates: Certificates, context: EngineContext
) -> None:
    environ = {name: places[place] for name, place in named.items()}
    async with RawUpstream(replies(MODELS), tls=certificates.context()) as upstream:
        engine = engine_of(upstream.base_url, environ, context)
        await start(engine)
        assert [asked.target for asked in upstream.asked] == ["/v1/models"]
        http = EngineHTTP(engine.endpoint)
        assert (await http.status("/models"))[0] == 200
        await http.close()


@pytest.mark.parametrize("named", REFUSED, ids=str)
async def test_a_server_of_an_authority_that_is_not_named_is_refused(
    named: dict[str, str], places: dict[str, str], certificates: Certificates, context: EngineContext
) -> None:
    environ = {name: places[place] for name, place in named.items()}
    async with RawUpstream(replies(MODELS), tls=certificates.context()) as upstream:
        with pytest.raises(UpstreamUnreachable, match="its certificate was not accepted"):
            await start(engine_of(upstream.base_url, environ, context))
        assert upstream.asked == []


@pytest.mark.parametrize(("named", "words"), UNREADABLE, ids=str)
async def test_certificates_that_cannot_be_read_are_named_by_their_variable(
    named: dict[str, str], words: str, places: dict[str, str], context: EngineContext
) -> None:
    environ = {name: places[place] for name, place in named.items()}
    with pytest.raises(UpstreamUnreachable) as caught:
        await start(engine_of("https://127.0.0.1:9/v1", environ, context))
    assert caught.value.message.startswith(f"The certificates of {words} cannot be read: ")
    assert caught.value.hint == "Correct the variable in the environment of the Jupyter server, and restart it."


async def test_without_tls_certificates_do_not_matter(places: dict[str, str], context: EngineContext) -> None:
    async with RawUpstream(replies(MODELS)) as upstream:
        await start(engine_of(upstream.base_url, {"SSL_CERT_FILE": places["MISSING"]}, context))
        assert len(upstream.asked) == 1


def test_names_and_certificates_are_always_checked(places: dict[str, str]) -> None:
    for environ in ({}, {"SSL_CERT_FILE": places["AUTHORITY"]}, {"SSL_CERT_DIR": places["FOLDER"]}):
        made = trusted_certificates(environ)
        assert made.check_hostname
        assert made.verify_mode is ssl.CERT_REQUIRED


# -- a model that is loaded through a proxy ------------------------------------------------------------------------


async def test_a_model_is_reached_through_the_proxy_of_the_environment(context: EngineContext) -> None:
    async with RawUpstream(replies(MODELS)) as proxy:
        engine = engine_of(f"http://{NAME}/v1", {"HTTP_PROXY": f"127.0.0.1:{proxy.port}"}, context)
        await start(engine)
    assert [asked.target for asked in proxy.asked] == [f"http://{NAME}/v1/models"]
    assert engine.endpoint.proxy == proxy.origin


async def test_a_model_of_https_is_reached_through_a_tunnel_with_certificates_of_the_environment(
    certificates: Certificates, context: EngineContext
) -> None:
    async with (
        RawUpstream(replies(MODELS), tls=certificates.context()) as upstream,
        RawUpstream(tunnel_to(upstream.port)) as proxy,
    ):
        environ = {"https_proxy": proxy.origin, "SSL_CERT_FILE": str(certificates.authority)}
        await start(engine_of(f"https://{NAME}/v1", environ, context))
        with pytest.raises(UpstreamUnreachable, match="its certificate was not accepted"):
            await start(engine_of(f"https://{NAME}/v1", {"https_proxy": proxy.origin}, context))
    assert [asked.target for asked in proxy.asked] == [f"{NAME}:443"] * 2
    assert [asked.headers["authorization"] for asked in upstream.asked] == [f"Bearer {KEY}"]


async def test_a_model_on_this_machine_is_reached_without_the_proxy(context: EngineContext) -> None:
    with refusing() as held:
        environ = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"127.0.0.1:{held.getsockname()[1]}")
        async with RawUpstream(replies(MODELS)) as upstream:
            engine = engine_of(upstream.base_url, environ, context)
            await start(engine)
            assert engine.endpoint.proxy is None


async def test_a_model_that_no_proxy_names_is_asked_for_directly(context: EngineContext) -> None:
    async with RawUpstream(replies(MODELS)) as proxy:
        environ = {"http_proxy": proxy.origin, "no_proxy": ".invalid"}
        with pytest.raises(UpstreamUnreachable, match="its name is not known"):
            await start(engine_of("http://nowhere.invalid/v1", environ, context))
        assert proxy.connections == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_down_is_told_when_a_model_is_loaded(scheme: str, context: EngineContext) -> None:
    with refusing() as held:
        environ = {"all_proxy": f"http://user:secret@127.0.0.1:{held.getsockname()[1]}"}
        with pytest.raises(UpstreamUnreachable) as caught:
            await start(engine_of(f"{scheme}://{NAME}/v1", environ, context))
    assert "the proxy on the way to it cannot be reached" in caught.value.message
    assert "secret" not in str(caught.value.to_wire())


def test_neither_key_nor_proxy_is_shown_with_an_endpoint(context: EngineContext) -> None:
    engine = engine_of(f"http://{NAME}/v1", {"http_proxy": "http://user:secret@proxy.test"}, context)
    assert engine.endpoint.proxy == "http://user:secret@proxy.test"
    assert "secret" not in repr(engine.endpoint)
    assert KEY not in repr(engine.endpoint)


def test_an_address_of_ipv6_in_brackets_is_a_rule_too() -> None:
    for rule in ("[fd00::1]", "[fd00::1]:8443"):
        assert proxy_for("https://[fd00::1]:8443", {"https_proxy": "http://p.test", "no_proxy": rule}) is None


def test_several_folders_of_certificates_may_be_named(certificates: Certificates, tmp_path: Path) -> None:
    made = trusted_certificates({"SSL_CERT_DIR": f"{tmp_path}:{certificates.folder}"})
    assert made is not None
