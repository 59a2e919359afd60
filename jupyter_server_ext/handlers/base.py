"""What every handler shares: who is asking, the body, and errors as JSON."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import traceback
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Protocol, TypeVar, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.extension.handler import ExtensionHandlerMixin
from jupyter_server.log import log_request
from jupyter_server.prometheus.log_functions import prometheus_log_method
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json
from tornado import web

from jupyter_server_ext.handlers.key_identity import KeyIdentity, given_key
from jupyter_server_ext.operations import Flag, Number, Seconds
from llmkit import errors
from llmkit.engines.base import does_not_fit, validation_details
from llmkit.errors import LLMKitError
from llmkit.registry.people import Person
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import MAX_CONFIGURATION_BYTES
from llmkit.tool_keys import ToolKey

RESOURCE = "llm"
METHODS: Final = ("get", "post", "put", "delete")
"""That a handler can have."""
MAX_DEPTH = 64
MAX_VALUES = 100_000
PARSE_IN_THREAD_BYTES = 256 << 10
_DECIMAL = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?")  # float() also takes "1_0", "inf" and "٣"
_MAY_OVERFLOW = re.compile(rb"\d[eE]|\d{300}")
_LOGGED_CHARACTERS = 300
_LOGGED_HEADERS = frozenset({"Host", "Accept", "Referer", "User-Agent"})
"""That Jupyter writes into its log with a request that failed."""
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class RegistryOwner(Protocol):
    """What handlers ask of the app."""

    max_body_size: int

    async def ready(self) -> ModelRegistry:
        """Give the registry, once it is ready."""
        ...

    def openapi(self, model_types: tuple[str, ...]) -> dict[str, Any]:
        """Give the OpenAPI document of all routes."""
        ...


@web.stream_request_body
class LLMHandler(ExtensionHandlerMixin, APIHandler):
    """Base of all handlers under ``/llm``.

    The body is taken as a stream, so that who is not allowed in, or sends too much, fills no memory.

    Attributes
    ----------
    opened_by_keys
        The methods that keys for tools open; a new endpoint has none unless it says so.
    tool_key
        The key for tools that the request came with; None for a user of the server.
    """

    max_body_bytes = MAX_CONFIGURATION_BYTES
    max_values = MAX_VALUES
    opened_by_keys: frozenset[str] = frozenset()
    tool_key: ToolKey | None = None

    def initialize(self, name: str) -> None:
        """Keep nothing of a body until it is known who sends it."""
        self._body: list[bytes] | None = None
        self._prepared = False
        self._body_bytes = 0
        key = given_key(self.request)
        self._key_identity = KeyIdentity(key) if key is not None else None
        super().initialize(name)

    @property
    def identity_provider(self) -> Any:
        """The server's own, but for a request that comes with a key for tools: the key alone says who asks."""
        return self._key_identity or super().identity_provider

    async def prepare(self) -> None:  # type: ignore[override]  # as in Jupyter's own API handlers
        """Let in who may, before the body is read."""
        await super().prepare()
        if self.current_user and self.request.method in ("POST", "PUT"):
            self._body = []
        self._prepared = True

    def data_received(self, chunk: bytes) -> None:
        """Keep a part of the body, as long as it is wanted."""
        self._body_bytes += len(chunk)
        if self._body_bytes > self.max_body_bytes:
            self._body = None
        elif self._body is not None:
            self._body.append(chunk)

    def set_signed_cookie(self, *args: Any, **kwargs: Any) -> None:
        """Set no login cookie: a token opens this API for one request, and makes no session in a client's cookie jar.

        Jupyter makes one of every request with a token, which would also take a tenth of the time of a request.
        """

    set_secure_cookie = set_signed_cookie  # its older name, which Jupyter uses

    @property
    def app(self) -> RegistryOwner:
        """The extension."""
        return cast("RegistryOwner", self.extensionapp)  # LLMKitApp, which imports this module

    async def registry(self) -> ModelRegistry:
        """Give the registry, once it is ready."""
        return await self.app.ready()

    @property
    def person(self) -> Person | None:
        """Who asks, where the authorizer tells people apart; None where all are one."""
        tell: Callable[[Any], Person] | None = getattr(self.authorizer, "person", None)
        return None if tell is None else tell(self.current_user)

    def check_administers(self) -> None:
        """Raise `NotAllowed` where many people share the server and this one does not administer it."""
        if self.person is not None and not self.person.administers:
            raise errors.NotAllowed("Only administrators of this server do this.", hint="Ask one of them.")

    # -- the request ---------------------------------------------------------------------------------------

    async def read_body(self, model: type[M]) -> M:
        """Read the body as strict JSON and check it.

        Raises
        ------
        TooLarge, MalformedRequest, DoesNotFit
        """
        return await self._read(_parse, model)

    async def read_object(self) -> dict[str, Any]:
        """Read the body as a strict JSON object, whatever is in it.

        Raises
        ------
        TooLarge, MalformedRequest
        """
        return await self._read(_parse_object)

    async def _read(self, parse: Callable[..., T], *args: Any) -> T:
        if self._body is None:
            raise errors.TooLarge(
                f"The body is larger than {self.max_body_bytes} bytes.",
                hint="Send less; this endpoint takes no more.",
            )
        body = b"".join(self._body)
        self._body = []  # a large prompt need not be held for as long as the answer takes
        # A large prompt takes the parser longer than the event loop may stand still.
        if len(body) > PARSE_IN_THREAD_BYTES:
            return await asyncio.to_thread(parse, body, self.max_values, *args)
        return parse(body, self.max_values, *args)

    def flag(self, flag: Flag) -> bool:
        """Read a query parameter that is true or false."""
        text = self.get_query_argument(flag.name, None)
        if text is None:
            return flag.default
        if text.lower() in ("true", "1"):
            return True
        if text.lower() in ("false", "0"):
            return False
        raise errors.MalformedRequest(f"`{flag.name}` must be true or false.", param=flag.name)

    def seconds(self, seconds: Seconds) -> float:
        """Read a query parameter that is a duration in seconds."""
        text = self.get_query_argument(seconds.name, None)
        if text is None:
            return seconds.default
        value = float(text) if _DECIMAL.fullmatch(text) else -1.0
        if not 0 <= value <= seconds.most:
            rule = f"`{seconds.name}` must be a number of seconds from 0 to {seconds.most:g}."
            raise errors.MalformedRequest(rule, param=seconds.name)
        return value

    def number(self, number: Number) -> int:
        """Read a query parameter that is a whole number."""
        text = self.get_query_argument(number.name, None)
        if text is None:
            return number.default
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= number.most):
            rule = f"`{number.name}` must be a whole number from 0 to {number.most}."
            raise errors.MalformedRequest(rule, param=number.name)
        return int(text)

    # -- the answer ----------------------------------------------------------------------------------------

    def answer(self, value: Any, status: int = HTTPStatus.OK) -> None:
        """Finish with JSON."""
        self.set_status(status)
        self.finish(to_json(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Turn any exception into the one form that errors have."""
        raised = kwargs.get("exc_info", (None, None, None))[1]
        error = raised if isinstance(raised, LLMKitError) else self._explain(status_code, raised)
        self.set_status(error.status)
        if not self._prepared:
            self.set_header("Connection", "close")  # Tornado will: the body was not read
        if error.status == HTTPStatus.TOO_MANY_REQUESTS:
            self.set_header("Retry-After", str(math.ceil(error.details.get("retry_after", 1))))
        elif error.status == HTTPStatus.METHOD_NOT_ALLOWED:
            own = (name for name in METHODS if getattr(type(self), name) is not getattr(LLMHandler, name))
            self.set_header("Allow", ", ".join(name.upper() for name in own))
        self.finish(to_json(error.to_wire()))

    def _explain(self, status: int, raised: BaseException | None) -> LLMKitError:
        said = (raised.log_message or "") if isinstance(raised, web.HTTPError) else ""
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            if self.current_user and "_xsrf" not in said:
                return errors.NotAllowed(
                    said or "You may not do this.", hint="The operator of the server decides what you may do."
                )
            return errors.NotAllowed(
                "Not authenticated."
                if not self.current_user
                else "A browser's cookie alone is not enough to change something: the XSRF token is missing.",
                hint="Send the server's token: `Authorization: token TOKEN` (`jupyter server list` shows it). "
                "A server without authentication needs both --IdentityProvider.token='' and "
                "--ServerApp.disable_check_xsrf=True.",
            )
        if status == HTTPStatus.NOT_FOUND:
            return errors.NotFound("There is nothing here.", hint="The README lists the endpoints.")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            return errors.MethodNotAllowed(f"{self.request.method} is not possible here.")
        if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return errors.MalformedRequest("The request could not be read.")
        return LLMKitError("The server failed on this request.", hint="The server's log says more.")

    def _log(self) -> None:
        """Log the request, but for one that went well where nobody reads of those: Jupyter would write it first."""
        log = self.settings.get("log_function")
        unread = self.get_status() < HTTPStatus.MULTIPLE_CHOICES and not _is_read(self.log, logging.DEBUG)
        # An operator's own function logs what it likes.
        if not (unread and isinstance(log, partial) and log.func is log_request):
            self.request.uri = _for_log(self.request.uri or "")
            for name in _LOGGED_HEADERS & self.request.headers.keys():
                self.request.headers[name] = _for_log(self.request.headers[name])
            super()._log()
        elif log.keywords.get("record_prometheus_metrics", True):
            prometheus_log_method(self)  # type: ignore[no-untyped-call]  # all else that Jupyter's log does

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Log what nobody expected; what was expected is the client's to read."""
        if not isinstance(value, LLMKitError | web.HTTPError):
            # Without the value: an exception's words can hold a part of the request.
            where = f"{self.request.method} {self.request.path[:200]!r}"
            self.log.error("%s failed: %s\n%s", where, typ.__name__, "".join(traceback.format_tb(tb)))


class UnknownPathHandler(LLMHandler):
    """Answers 404 to every path under ``/llm`` that no other handler has."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource=RESOURCE)
    def get(self) -> None:
        """Answer 404."""
        raise errors.NotFound(f"There is no {self.request.path[:200]!r}.", hint="The README lists the endpoints.")

    # The one exception to a decorated method a handler: the same class, action and resource.
    post = put = delete = patch = get


def _for_log(text: str) -> str:
    """Cut and escape what a client has sent, so that it neither fills a log nor steers the terminal that shows it."""
    if len(text) > _LOGGED_CHARACTERS:
        text = text[:_LOGGED_CHARACTERS] + "..."
    return text if text.isascii() and text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _is_read(logger: logging.Logger, level: int) -> bool:
    """Say whether a handler takes what is logged at a level; Jupyter's loggers let all through to them."""
    at: logging.Logger | None = logger if logger.isEnabledFor(level) else None
    while at is not None:
        if any(handler.level <= level for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def _parse(body: bytes, max_values: int, model: type[M]) -> M:
    try:
        return model.model_validate(_parse_object(body, max_values))
    except ValidationError as error:
        raise does_not_fit(validation_details(error, model)) from None


def _parse_object(body: bytes, max_values: int) -> dict[str, Any]:
    try:
        # Refuses what Python's own parser lets through: NaN, Infinity, lone surrogates, wrong UTF-8.
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise errors.MalformedRequest(
            f"The body is not strict JSON: {error}.", hint="Send UTF-8 JSON without NaN or Infinity."
        ) from None
    if not isinstance(value, dict):
        raise errors.MalformedRequest("The body must be a JSON object.", hint='For example {"model_id": "demo", ...}.')
    if (
        len(body) > max_values
        or body.count(b"{") + body.count(b"[") > MAX_DEPTH
        or _MAY_OVERFLOW.search(body) is not None
    ):
        _check_shape(value, max_values)
    return value


def _check_shape(value: dict[str, Any], max_values: int) -> None:
    """Refuse what no request needs: deep nesting, very many values, numbers that overflow.

    Most bodies show at a glance that they have nothing of that, and are not walked through.
    """
    level: list[Any] = [value]
    values = 0
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        values += len(level)
        if values > max_values:
            raise errors.MalformedRequest(f"The body holds more than {max_values} values.")
        if any(isinstance(inner, float) and not math.isfinite(inner) for inner in level):
            raise errors.MalformedRequest("The body holds a number that is too large.")
        level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return
    raise errors.MalformedRequest(f"The body is nested deeper than {MAX_DEPTH} levels.")
