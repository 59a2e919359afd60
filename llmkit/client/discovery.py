"""Find the Jupyter server that a kernel or a script belongs to.

In this order: what `connect` is given; ``LLMKIT_SERVER_URL`` and ``LLMKIT_TOKEN``; the service of a JupyterHub that
``LLMKIT_SHARED_URL`` names; the server that started the kernel, or that this process runs under; JupyterHub's
variables; any running server of this user that answers ``/llm/health``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from pydantic import ValidationError

from llmkit.client.client import Client
from llmkit.client.connection import Connection, Server, clean_token, is_missing, parse_url
from llmkit.client.installed import explain_missing
from llmkit.errors import IncompatibleVersion, LLMKitError, NotAllowed, ServerNotFound
from llmkit.schemas import API_VERSION, Health
from llmkit.tool_keys import is_key

PROBE_SECONDS = 3.0
START_HINT = (
    "llmkit.start() starts one that ends with this kernel or script; in a terminal, `jupyter lab` or `jupyter llmkit` "
    "starts one in the environment where llmkit is installed. "
    "For a server elsewhere: llmkit.connect(url, token=...), or set LLMKIT_SERVER_URL and LLMKIT_TOKEN."
)


SHARED_HINT = (
    "Who may use what JupyterHub's users share is decided by the Hub's administrators. "
    "llmkit.connect(shared=False) finds a server of your own."
)
MAX_PID = 2**31 - 1
"""Of no system is one larger; to ask for a process beyond is an error."""


@dataclass(frozen=True)
class Candidate:
    """A server to try, or the reason why there is none to try, and where it comes from."""

    source: str
    server: Server | None = None
    reason: str = ""
    explicit: bool = False
    """The user named it: if it fails, no other is tried."""


def connect(
    url: str | None = None,
    token: str | None = None,
    *,
    verify: bool | str | None = None,
    shared: bool | None = None,
) -> Client:
    """Find the server and give a client of it.

    Inside Jupyter nothing has to be given.

    Parameters
    ----------
    url
        Address of the Jupyter server, also as copied from the browser with ``?token=...``.
    token
        Its token; a key for tools opens too little for a client.
    verify
        For ``https``: the path of the server's certificate or of its authority, or False to trust any. Default:
        ``LLMKIT_VERIFY``, else the system's authorities.
    shared
        Under JupyterHub: True for the service that many people share, False for what is yours alone. Default: the
        service, if the Hub names one in ``LLMKIT_SHARED_URL``.

    Raises
    ------
    ServerNotFound
        No server was found, or the one named does not answer; says everything that was tried.
    ExtensionMissing
        The server's environment is without llmkit.
    RestartNeeded
        The server was started before llmkit was installed.
    IncompatibleVersion
        Client and server cannot talk to each other.
    NotAuthenticated, NotAllowed
        The token is missing or wrong, or a key for tools.

    Examples
    --------
    >>> client = llmkit.connect()
    >>> client
    <llmkit.Client http://127.0.0.1:...>

    A server elsewhere, here one that is not there:

    >>> client = llmkit.connect("http://127.0.0.1:1/user/ada/", token="...")
    Traceback (most recent call last):
    llmkit.errors.ServerNotFound: http://127.0.0.1:1/user/ada/ does not answer.
    Is the Jupyter server running? `jupyter server list` shows those that are.
    """
    tried: list[str] = []
    first: LLMKitError | None = None
    trust = _trust(os.environ) if verify is None else verify
    for candidate in candidates(url, os.environ, shared=shared):
        server = candidate.server
        if server is None:
            tried.append(f"{candidate.source}: {candidate.reason}")
            continue
        try:
            connection = Connection(replace(server, token=clean_token(token or server.token), verify=trust))
            try:
                probe(connection)
            except BaseException:
                connection.close()
                raise
            return Client(connection)
        except LLMKitError as error:
            if candidate.explicit:
                raise
            tried.append(f"{candidate.source}: {error.message}")
            if first is None and not isinstance(error, ServerNotFound):
                first = error
    # A server that could be cured says more than the absence of all others.
    if first is not None:
        raise first
    raise ServerNotFound(
        "No Jupyter server with llmkit was found. Tried:\n" + "\n".join(f"  - {line}" for line in tried),
        hint=START_HINT,
        details={"tried": tried},
    )


def probe(connection: Connection) -> Health:
    """Ask a server for its health.

    Raises
    ------
    LLMKitError
        What is wrong, with the cure.
    """
    server = connection.server
    response = connection.raw("GET", "llm/health", seconds=PROBE_SECONDS)
    if is_missing(response):
        is_jupyter = connection.raw("GET", "api", seconds=PROBE_SECONDS)
        if not (is_jupyter.is_success and "version" in is_jupyter.text):
            raise ServerNotFound(
                f"Something answers at {server.url}, but it is no Jupyter server.",
                hint="Give the whole base URL, for example http://localhost:8888/user/ada/.",
            )
        raise explain_missing(server)
    if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        hint = SHARED_HINT if server.shared else _credentials_hint(server)
        raise NotAllowed(f"{server.url} refuses {_credentials(server)}.", hint=hint)
    if not response.is_success:
        raise connection.error_of(response)
    try:
        health = Health.model_validate_json(response.content)
    except ValidationError:
        raise ServerNotFound(
            f"{server.url} answers, but not as llmkit does.", hint="Is it the Jupyter server's own address?"
        ) from None
    if health.api_version != API_VERSION:
        older = health.api_version.isdigit() and int(health.api_version) < int(API_VERSION)
        raise IncompatibleVersion(
            f"llmkit {health.version} of {server.url} speaks version {health.api_version} of the API, "
            f"this client version {API_VERSION}.",
            hint="Upgrade llmkit in the environment of the "
            + ("server, and restart it." if older else "kernel, and restart the kernel."),
        )
    return health


def _credentials(server: Server) -> str:
    if _is_tool_key(server):
        return "a key for tools in the place of its token"
    return "the token" if server.token else "a request without a token"


def _credentials_hint(server: Server) -> str:
    if _is_tool_key(server):
        return (
            "Such a key opens /llm/v1 and /llm/inference/ alone: "
            f"`openai.OpenAI(base_url={server.url + 'llm/v1'!r}, api_key=KEY)` asks with it. "
            "llmkit.connect() and the `llmkit` command take the server's token; `jupyter server list` shows it."
        )
    hint = "Pass it: llmkit.connect(url, token=...), or set LLMKIT_TOKEN; `jupyter server list` shows it."
    if not server.token:
        hint += " A server with only a password has none: start it with --IdentityProvider.token=..."
    return hint


def _is_tool_key(server: Server) -> bool:
    return server.token is not None and is_key(server.token)


# -- where to look ---------------------------------------------------------------------------------------------


def candidates(url: str | None, environ: Mapping[str, str], *, shared: bool | None = None) -> Iterator[Candidate]:
    """Give what to try, in order, each server with its own token; no server is asked anything here.

    ``shared`` is that of `connect`.

    Raises
    ------
    ServerNotFound
        If the address that was named is none.
    """
    named, service = environ.get("LLMKIT_SERVER_URL"), environ.get("LLMKIT_SHARED_URL")
    if url is not None:
        yield Candidate("the url given", _named(url, environ), explicit=True)
    elif shared:
        if not service:
            raise ServerNotFound(
                "LLMKIT_SHARED_URL is not set: this JupyterHub names no llmkit that many people share.",
                hint="llmkit.connect() finds one of your own.",
            )
        yield Candidate("LLMKIT_SHARED_URL", _named(service, environ), explicit=True)
    elif named:
        yield Candidate("LLMKIT_SERVER_URL", _named(named, environ), explicit=True)
    elif service and shared is None:
        # If it fails, no other is tried: it is not the same models that another one has.
        yield Candidate("LLMKIT_SHARED_URL", _named(service, environ), explicit=True)
    else:
        yield Candidate("LLMKIT_SERVER_URL", reason="not set")
        folder = runtime_dir()
        tried: set[str] = set()
        for find in (_parent, _above):
            found = find(folder, environ)
            if found.server is None or found.server.url not in tried:
                yield found
            if found.server is not None:
                tried.add(found.server.url)
        yield _hub(environ)
        yield from _running(folder, skip=tried)


def names_shared(environ: Mapping[str, str]) -> bool:
    """Say whether a Hub names a registry that many people share, beside one's own."""
    return bool(environ.get("LLMKIT_SHARED_URL"))


def _trust(environ: Mapping[str, str]) -> bool | str:
    text = environ.get("LLMKIT_VERIFY", "")
    return text.lower() not in ("0", "false", "no") and (text or True)


def _named(url: str, environ: Mapping[str, str]) -> Server:
    base, token = parse_url(url)
    known = next((server for server, _ in running_servers(runtime_dir()) if _same(server.url, base)), None)
    # A token goes only to the server that it is for.
    service = environ.get("LLMKIT_SHARED_URL")
    shared = bool(service) and _same(parse_url(service or "")[0], base)
    if token is None and shared:
        token = environ.get("JUPYTERHUB_API_TOKEN")
    named = environ.get("LLMKIT_SERVER_URL")
    if token is None and (not named or _same(parse_url(named)[0], base)):
        token = environ.get("LLMKIT_TOKEN")
    if token is None and known is not None:
        token = known.token
    return Server(base, token or None, pid=known.pid if known else None, shared=shared)


def _same(one: str, other: str) -> bool:
    """Say whether two base URLs are one server: `localhost` is 127.0.0.1."""
    a, b = urlsplit(one), urlsplit(other)
    hosts = {(parts.hostname or "").replace("localhost", "127.0.0.1") for parts in (a, b)}
    return len(hosts) == 1 and (a.scheme, a.port, a.path) == (b.scheme, b.port, b.path)


def _parent(folder: Path, environ: Mapping[str, str]) -> Candidate:
    source = "the server that started this kernel"
    pid = environ.get("JPY_PARENT_PID", "")
    if not pid.isdigit():
        return Candidate(source, reason="JPY_PARENT_PID is not set")
    file = folder / f"jpserver-{pid}.json"
    server = read_server_file(file)
    if server is None:
        return Candidate(source, reason=f"no {file}")
    return Candidate(source, _with_token(server, environ))


def _above(folder: Path, environ: Mapping[str, str]) -> Candidate:
    """Find the server that this process runs under, as in a terminal of JupyterLab or where nbconvert runs in a cell.

    nbconvert and papermill name themselves in ``JPY_PARENT_PID``. For a terminal Jupyter names the server in
    ``JUPYTER_SERVER_URL``, but with the port that it would have liked to have: where that was taken, it is the address
    of another server. So the server is looked for among the processes above this one, and by the folder that it serves
    where it is none of them, as within tmux.
    """
    source = "the server that this process runs under"
    above: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):  # one has ended meanwhile
        above = psutil.Process().parents()
    files = (read_server_file(folder / f"jpserver-{process.pid}.json") for process in above)
    server = next(filter(None, files), None)
    if server is None:
        root = environ.get("JUPYTER_SERVER_ROOT")
        if not root:
            return Candidate(source, reason="none is above it, and JUPYTER_SERVER_ROOT is not set")
        place = Path(root).absolute()
        serving = [found for found, alive in running_servers(folder) if alive and Path(found.root) == place]
        if len(serving) != 1:
            return Candidate(source, reason=f"{len(serving) or 'no'} running servers serve {root}")
        (server,) = serving
    return Candidate(source, _with_token(server, environ))


def _with_token(server: Server, environ: Mapping[str, str]) -> Server:
    # Under JupyterHub a server has no token of its own.
    return replace(server, token=server.token or environ.get("JUPYTERHUB_API_TOKEN"))


def _hub(environ: Mapping[str, str]) -> Candidate:
    prefix, token = environ.get("JUPYTERHUB_SERVICE_PREFIX"), environ.get("JUPYTERHUB_API_TOKEN")
    if not prefix or not token:
        return Candidate("JupyterHub", reason="JUPYTERHUB_SERVICE_PREFIX and JUPYTERHUB_API_TOKEN are not set")
    # Where the hub told the single-user server to listen; the public address may be out of reach from here.
    address = environ.get("JUPYTERHUB_SERVICE_URL") or environ.get("JUPYTERHUB_PUBLIC_URL")
    if not address:
        return Candidate("JupyterHub", reason="JUPYTERHUB_SERVICE_URL is not set")
    try:
        parts = urlsplit(parse_url(address)[0])
    except ServerNotFound as error:
        return Candidate("JupyterHub", reason=error.message)
    return Candidate("JupyterHub", Server(f"{parts.scheme}://{parts.netloc}/{prefix.strip('/')}/", token))


def _running(folder: Path, skip: Collection[str]) -> Iterator[Candidate]:
    ended = 0
    for server, alive in running_servers(folder):
        if not alive:
            ended += 1
        elif server.url not in skip:
            yield Candidate(f"running server {server.url}", server)
    note = f" ({ended} left by servers that have ended)" if ended else ""
    yield Candidate("running servers", reason=f"no more in {folder}{note}")


def running_servers(folder: Path) -> Iterator[tuple[Server, bool]]:
    """Give every server that has a file in the runtime folder, newest first, and whether its process lives."""
    files = []
    for file in folder.glob("jpserver-*.json"):
        try:
            files.append((file.stat().st_mtime, file))
        except OSError:
            continue  # removed meanwhile
    for _, file in sorted(files, reverse=True):
        server = read_server_file(file)
        if server is not None and server.pid is not None:
            yield server, psutil.pid_exists(server.pid)


def read_server_file(file: Path) -> Server | None:
    """Read what a Jupyter server wrote about itself; None if it cannot be read."""
    try:
        told = json.loads(file.read_bytes())
        uds = told.get("sock") or None
        # Over a unix socket the host is only a name.
        url = f"http://localhost{told['base_url']}" if uds else parse_url(told["url"])[0]
        token, pid = told.get("token") or None, int(told["pid"])
        if not (isinstance(token, str | None) and isinstance(uds, str | None) and 0 < pid <= MAX_PID):
            return None
        return Server(url, token, uds=uds, pid=pid, root=str(told.get("root_dir", "")))
    except (OSError, ArithmeticError, RecursionError, ValueError, TypeError, KeyError, AttributeError, ServerNotFound):
        return None


def runtime_dir() -> Path:
    """Give the folder where Jupyter's running programs are noted."""
    from jupyter_core.paths import jupyter_runtime_dir  # not needed where an address is known

    return Path(jupyter_runtime_dir())
