"""One Jupyter server as seen from a client: its address, its token, and requests whose errors are llmkit's."""

from __future__ import annotations

import importlib
import ipaddress
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import httpx

from llmkit.client.bodies import as_body
from llmkit.errors import ConnectError, LLMKitError, NotAuthenticated, ServerNotFound, TimedOut, from_wire

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 30.0
LOG_SILENCE_SECONDS = 60.0
"""The server says at least that it is there more often than that."""
KEPT_CONNECTIONS = 100
_PROXY_HINT = "NO_PROXY=HOST has a server reached without; for SOCKS: pip install 'httpx[socks]'."
# What follows the base URL in addresses that people copy from their browser.
_PAGES = re.compile(r"/(?:lab|tree|notebooks|doc|consoles|edit|llm|login)(?:/.*)?$")


@dataclass(frozen=True)
class Server:
    """Where a Jupyter server is and what opens it.

    Attributes
    ----------
    url
        Base URL with a slash at its end, without a query.
    token
        Opens it; None for a server without authentication.
    verify
        Whether an ``https`` certificate must be trusted, or the path of the certificate (or of its authority).
    uds
        Path of the unix socket that it listens on, if it does.
    pid, root
        Its process and the folder that it serves, where these are known.
    shared
        Whether many people share it, as a service of their JupyterHub.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    verify: bool | str = True
    uds: str | None = None
    pid: int | None = None
    root: str = ""
    shared: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What authenticates a request."""
        return {"Authorization": f"token {self.token}"} if self.token else {}

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, so that no proxy may stand between."""
        host = urlsplit(self.url).hostname or ""
        try:
            return self.uds is not None or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def parse_url(text: str) -> tuple[str, str | None]:
    """Take an address apart, also one copied from a browser.

    Returns
    -------
    tuple
        Base URL with a slash at its end, and the token if the address carried one.

    Raises
    ------
    ServerNotFound
        If it is no address of a web server.

    Examples
    --------
    >>> parse_url("http://localhost:8888/user/ada/lab/tree/a.ipynb?token=abc")
    ('http://localhost:8888/user/ada/', 'abc')
    """
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https") or not _is_name(host):
        # Before an @ stands a password, and behind ? or # a token.
        shown = "What was given" if "@" in text else repr(re.split("[?#]", text)[0])
        raise ServerNotFound(
            f"{shown} is no address of a Jupyter server.", hint="It looks like http://localhost:8888/."
        )
    if host in ("0.0.0.0", "::"):  # noqa: S104  # a server that listens everywhere is reached here
        host = "127.0.0.1"
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port is not None else ""
    path = _PAGES.sub("", parts.path).rstrip("/") + "/"
    token = parse_qs(parts.query).get("token", [None])[0]
    return urlunsplit((parts.scheme, netloc, path, "", "")), token


def _is_name(host: str) -> bool:
    """Say whether a host can be looked up: no part of its name is empty or too long, and each letter is allowed."""
    try:
        encoded = httpx.URL(scheme="http", host=host).raw_host
        encoded.decode("ascii").encode("idna")  # what a socket does with it
    except (httpx.InvalidURL, ValueError):
        return False
    return True


def clean_token(token: str | None) -> str | None:
    r"""Take blanks and line ends away that a token has from a file or from copying.

    Raises
    ------
    NotAuthenticated
        If what is left can be no token.

    Examples
    --------
    >>> clean_token("abc\n")
    'abc'
    """
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()):
        raise NotAuthenticated(
            "The token has characters that no token has: letters with accents, line ends, or the like.",
            hint="Copy it again; `jupyter server list` shows it. It is that of `token=`, LLMKIT_TOKEN or the address.",
        )
    return token or None


class Connection:
    """Requests to one server over kept-alive connections; threads may share it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._http = _http(server)

    def move_to(self, server: Server) -> None:
        """Go on at another address, or with another token: the server was started anew.

        Raises
        ------
        ConnectError
            If its certificate cannot be read.
        """
        before, self._http = self._http, _http(server)
        self.server = server
        before.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def openai_arguments(self, given: Mapping[str, Any], *, is_async: bool = False) -> dict[str, Any]:
        """Give what makes a client of the ``openai`` package one of this server; what is given wins."""
        arguments: dict[str, Any] = {
            "base_url": f"{self.server.url}llm/v1",
            "api_key": self.server.token or "none",  # the package insists on one
            **given,
        }
        if "http_client" not in arguments:
            import openai  # slow to import

            made = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
            # The package may bring another httpx than ours: newer ones build upon httpx2.
            base = next(one for one in made.__mro__ if one.__name__ in ("Client", "AsyncClient"))
            library = importlib.import_module(base.__module__.partition(".")[0])
            # Nothing under /llm redirects, and the token is for this server alone.
            with _proxies_read(self.server, library):
                more = {**_reach(self.server, library, is_async=is_async), "follow_redirects": False}
                arguments["http_client"] = made(**more)
        return arguments

    def raw(self, method: str, path: str, *, seconds: float = REQUEST_SECONDS, **kwargs: Any) -> httpx.Response:
        """Send a request and give the answer, whatever its status.

        Raises
        ------
        ServerNotFound, TimedOut
            If there is no answer.
        """
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            try:
                return self._http.request(method, path, timeout=timeout, **kwargs)
            except httpx.RemoteProtocolError:
                # The server closed a kept-alive connection just as it was to be used again.
                if method != "GET":
                    raise
                return self._http.request(method, path, timeout=timeout, **kwargs)
        except httpx.HTTPError as error:
            raise self._explain(error) from error

    def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        seconds: float = REQUEST_SECONDS,
    ) -> Any:
        """Send a request and give the JSON of its answer.

        Raises
        ------
        LLMKitError
            What the server said, or that it said nothing; `DoesNotFit` if ``json`` is none.
        """
        response = self.raw(method, path, seconds=seconds, params=params, **_content(json))
        if not response.is_success:
            raise self.error_of(response)
        return self._json(response)

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        seconds: float,
    ) -> Iterator[httpx.Response]:
        """Send a request and give the answer while it comes; leaving ends it on the server too.

        Raises
        ------
        LLMKitError
            What the server said, or that it said nothing for so many seconds.
        """
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            with self._http.stream(method, path, params=params, timeout=timeout, **_content(json)) as response:
                if not response.is_success:
                    response.read()
                    raise self.error_of(response)
                yield response
        except httpx.HTTPError as error:
            raise self._explain(error) from error

    def log_stream(self, model_id: str, tail: int) -> AbstractContextManager[httpx.Response]:
        """Open the log of an engine, which goes on: its last lines first."""
        params = {"tail": tail, "follow": "true"}
        path = path_to("llm/models", model_id) + "/logs"
        return self.stream("GET", path, params=params, seconds=LOG_SILENCE_SECONDS)

    def error_of(self, response: httpx.Response) -> LLMKitError:
        """Give the error that an answer without success stands for."""
        if response.is_redirect:
            # Nothing under /llm redirects: this is a page that wants a login.
            return NotAuthenticated(
                f"{self.server.url} asks for a login.",
                hint="Give the server's token: llmkit.connect(url, token=...), or set LLMKIT_TOKEN.",
            )
        try:
            body = response.json()
        except ValueError:
            body = f"{self.server.url} answered {response.status_code} {response.reason_phrase}."
        return from_wire(response.status_code, body)

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise ConnectError(
                f"{self.server.url} answered something that is no JSON.",
                hint="A proxy or a login page may stand before the server.",
            ) from None

    def _explain(self, error: httpx.HTTPError) -> LLMKitError:
        url = self.server.url
        if _is_certificate_error(error):
            return ConnectError(
                f"The certificate of {url} is not trusted.",
                hint="Name it: llmkit.connect(verify='/path/of/certificate.pem'), or set LLMKIT_VERIFY to that path.",
            )
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return TimedOut(f"{url} did not answer in time.", hint="The server may be busy; try again.")
        if isinstance(error, httpx.ProxyError):
            return ConnectError(f"The proxy on the way to {url} refuses: {error}.", hint=_PROXY_HINT)
        return ServerNotFound(
            f"{url} does not answer.", hint="Is the Jupyter server running? `jupyter server list` shows those that are."
        )


def _http(server: Server) -> httpx.Client:
    with _proxies_read(server, httpx):
        return httpx.Client(
            base_url=server.url,
            headers={**server.headers, "Accept": "application/json"},
            follow_redirects=False,
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
            **_reach(server, httpx),
        )


def _content(json: Any) -> dict[str, Any]:
    return {} if json is None else {"content": as_body(json), "headers": {"Content-Type": "application/json"}}


@contextmanager
def _proxies_read(server: Server, library: Any) -> Iterator[None]:
    """Explain why no client can be made: the variables that name proxies are read with it."""
    try:
        yield
    except (ImportError, ValueError, library.InvalidURL) as error:
        why = "needs the package socksio" if isinstance(error, ImportError) else "is no address of a proxy"
        raise ConnectError(
            f"{server.url} cannot be reached: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY {why}.", hint=_PROXY_HINT
        ) from None


def _reach(server: Server, library: Any, *, is_async: bool = False) -> dict[str, Any]:
    """Give the arguments that have a client of httpx, or of a library that is like it, reach a server."""
    # Reading the system's certificates takes longer than a whole request; plain http needs none.
    verify: bool | ssl.SSLContext = False
    if server.url.startswith("https:"):
        verify = _trust_only(server.verify) if isinstance(server.verify, str) else server.verify
    # As many as there are threads: one that waits for a free connection would wait for somebody's answer.
    limits = library.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS)
    arguments = {"verify": verify, "trust_env": not server.is_local, "limits": limits}
    if server.uds:
        transport = library.AsyncHTTPTransport if is_async else library.HTTPTransport
        arguments["transport"] = transport(uds=server.uds, **arguments)
    return arguments


def _trust_only(path: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError):
        raise ConnectError(
            f"{path!r} is no readable certificate.", hint="`verify` and LLMKIT_VERIFY take the path of a PEM file."
        ) from None


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def path_to(resource: str, name: str) -> str:
    """Give the path of one thing of a resource.

    Raises
    ------
    LLMKitError
        If the name is empty: the path would be that of another resource.

    Examples
    --------
    >>> path_to("llm/models", "a/b")
    'llm/models/a%2Fb'
    """
    if not name:
        raise LLMKitError(f"The name in {resource}/... is empty.")
    return f"{resource}/{quote(name, safe='')}"


def is_missing(response: httpx.Response) -> bool:
    """Say whether an answer to a path of ours shows that no llmkit is there."""
    if response.status_code != HTTPStatus.NOT_FOUND:
        return False
    try:
        body = response.json()
    except ValueError:
        return True
    return not (isinstance(body, dict) and isinstance(body.get("error"), dict))
