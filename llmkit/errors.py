"""Every error of llmkit, each with its HTTP status and its code.

The server raises these and turns them into JSON in one place; the client turns the JSON back into the same
classes, so that a notebook sees the server's words.

.. code-block:: text

    LLMKitError                     500 internal_error
    ├── MalformedRequest            400 malformed_request
    ├── NotAuthenticated            401 not_authenticated
    ├── NotAllowed                  403 not_allowed
    │   ├── ConversationsNotKept        conversations_not_kept
    │   └── RefusedByOperator           refused_by_operator
    ├── NotFound                    404 not_found
    │   ├── ConfigurationNotFound       configuration_not_found
    │   ├── ModelNotFound               model_not_found
    │   ├── RequestNotFound             request_not_found
    │   ├── ConversationNotFound        conversation_not_found
    │   └── KeyNotFound                 key_not_found
    ├── MethodNotAllowed            405 method_not_allowed
    ├── WrongState                  409 wrong_state
    │   ├── ConfigurationExists         configuration_exists
    │   ├── ConfigurationReadOnly       configuration_read_only
    │   ├── ModelNotLoaded              model_not_loaded
    │   ├── ModelIsLoaded               model_is_loaded
    │   ├── ModelUnloaded               model_unloaded
    │   ├── RequestCancelled            request_cancelled
    │   ├── ModelLiveElsewhere          model_live_elsewhere
    │   ├── ConversationChanged         conversation_changed
    │   ├── KeyExists                   key_exists
    │   ├── NoRoom                      no_room
    │   └── LoadCancelled               load_cancelled
    ├── TooLarge                    413 too_large
    ├── DoesNotFit                  422 does_not_fit
    │   ├── KeyNotAllowed               key_not_allowed
    │   ├── KeyMissing                  key_missing
    │   ├── ModelNameNotFound           model_name_not_found
    │   ├── ParameterForbidden          parameter_forbidden
    │   ├── NotSupported                not_supported
    │   ├── ContextLengthExceeded       context_length_exceeded
    │   ├── EngineArgumentRefused       engine_argument_refused
    │   └── EngineRefused               engine_refused
    ├── QueueFull                   429 queue_full
    ├── BudgetExhausted             429 budget_exhausted
    ├── RateLimited                 429 rate_limited
    ├── EngineGone                  502 engine_gone
    │   ├── EngineCrashed               engine_crashed
    │   ├── LoadFailed                  load_failed
    │   │   ├── OutOfMemory                 out_of_memory
    │   │   ├── KVCacheTooSmall             kv_cache_too_small
    │   │   ├── ModelGated                  model_gated
    │   │   ├── UnknownArchitecture         unknown_architecture
    │   │   └── LoadStalled                 load_stalled
    │   ├── UpstreamUnreachable         upstream_unreachable
    │   ├── UpstreamRefusedKey          upstream_refused_key
    │   └── UpstreamFailed              upstream_failed
    ├── NotReady                    503 not_ready
    │   ├── EngineNotInstalled          engine_not_installed
    │   └── ServerStopping              server_stopping
    ├── TimedOut                    504 timed_out
    ├── DiskFull                    507 disk_full
    └── ConnectError                503 connect_error (client only: no server to talk to)
        ├── ServerNotFound              server_not_found
        ├── ExtensionMissing            extension_missing
        ├── RestartNeeded               restart_needed
        └── IncompatibleVersion         incompatible_version
"""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

_BOLD_RED, _PLAIN = "\033[1;31m", "\033[0m"


class LLMKitError(Exception):
    """Base of all errors.

    Parameters
    ----------
    message
        What went wrong, for a person.
    hint
        What to do about it, for a person.
    param
        The field, argument or path parameter that was at fault.
    details
        JSON-serialisable facts that a program may use, for example every wrong field with its path.

    Notes
    -----
    In a notebook it shows as its message, its hint and the line of the cell. The whole traceback is there too:
    ``%xmode Verbose`` and then ``%tb``, or ``traceback.print_exception(sys.last_value)``.

    Examples
    --------
    >>> print(LLMKitError("The model is not loaded.", hint="client.load('demo') loads it."))
    The model is not loaded.
    client.load('demo') loads it.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """Give what IPython shows: a few lines, or the whole traceback after ``%xmode Verbose``."""
        # Only within IPython is this called; the package itself is needed nowhere else.
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if shell is not None and str(shell.InteractiveTB.mode) == "Verbose":
            whole: list[str] = shell.InteractiveTB.structured_traceback(type(self), self, self.__traceback__)
            return whole
        lines = [f"{_BOLD_RED}{type(self).__name__}{_PLAIN}: {self.message}"]
        if self.hint:
            lines.append(f"Hint: {self.hint}")
        lines += [f"  {line}" for line in _line_of_the_user(self)]
        lines += getattr(self, "__notes__", [])
        return lines

    @property
    def type(self) -> str:
        """OpenAI's coarse class of the error, for clients that look at ``error.type``."""
        if self.status in (401, 403):
            return "authentication_error" if self.status == HTTPStatus.UNAUTHORIZED else "permission_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"

    def to_wire(self) -> dict[str, Any]:
        """Give the JSON body of an error answer."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "code": self.code,
            "param": self.param,
            "hint": self.hint,
        }
        if self.details:
            error["details"] = self.details
        return {"message": self.message, "reason": HTTPStatus(self.status).phrase, "error": error}


class MalformedRequest(LLMKitError):
    """The body is no strict UTF-8 JSON object, or a query parameter cannot be read."""

    status, code = 400, "malformed_request"


class NotAuthenticated(LLMKitError):
    """No credentials, or wrong ones."""

    status, code = 401, "not_authenticated"


class NotAllowed(LLMKitError):
    """Known, but not permitted to do this."""

    status, code = 403, "not_allowed"


class ConversationsNotKept(NotAllowed):
    """The operator of this server has it keep no conversations."""

    code = "conversations_not_kept"


class RefusedByOperator(NotAllowed):
    """The operator of this server does not allow this of anybody."""

    code = "refused_by_operator"


class NotFound(LLMKitError):
    """There is nothing at this path."""

    status, code = 404, "not_found"


class ConfigurationNotFound(NotFound):
    """No configuration has this ``config_id``."""

    code = "configuration_not_found"


class ModelNotFound(NotFound):
    """No configuration has this ``model_id``."""

    code = "model_not_found"


class RequestNotFound(NotFound):
    """No running request has this ``request_id``."""

    code = "request_not_found"


class ConversationNotFound(NotFound):
    """No conversation that is kept has this ``conversation_id``."""

    code = "conversation_not_found"


class KeyNotFound(NotFound):
    """No key for tools has this name."""

    code = "key_not_found"


class MethodNotAllowed(LLMKitError):
    """The path exists, the method does not."""

    status, code = 405, "method_not_allowed"


class WrongState(LLMKitError):
    """The request fits, but not now."""

    status, code = 409, "wrong_state"


class ConfigurationExists(WrongState):
    """Another configuration has this ``model_id`` already."""

    code = "configuration_exists"


class ConfigurationReadOnly(WrongState):
    """The operator declared this configuration; only the operator changes it."""

    code = "configuration_read_only"


class ModelNotLoaded(WrongState):
    """The model has to be loaded first."""

    code = "model_not_loaded"


class ModelIsLoaded(WrongState):
    """The model has to be unloaded first."""

    code = "model_is_loaded"


class ModelUnloaded(WrongState):
    """The model was unloaded while the request ran."""

    code = "model_unloaded"


class RequestCancelled(WrongState):
    """Somebody has ended the request by its ``request_id``."""

    code = "request_cancelled"


class ModelLiveElsewhere(WrongState):
    """Another server of this home has the model loaded."""

    code = "model_live_elsewhere"


class ConversationChanged(WrongState):
    """The conversation that is kept is not the one that this one follows."""

    code = "conversation_changed"


class KeyExists(WrongState):
    """Another key for tools has this name already."""

    code = "key_exists"


class NoRoom(WrongState):
    """No device has room for the model; the message says who holds it."""

    code = "no_room"


class LoadCancelled(WrongState):
    """The model was unloaded while it was loading."""

    code = "load_cancelled"


class TooLarge(LLMKitError):
    """The body is larger than this endpoint takes."""

    status, code = 413, "too_large"


class DoesNotFit(LLMKitError):
    """Well-formed, but a field has a wrong type, name or value."""

    status, code = 422, "does_not_fit"


class KeyNotAllowed(DoesNotFit):
    """This key may not be used, or not for this address."""

    code = "key_not_allowed"


class KeyMissing(DoesNotFit):
    """The endpoint needs a key and there is none."""

    code = "key_missing"


class ModelNameNotFound(DoesNotFit):
    """The engine knows no model of this name."""

    code = "model_name_not_found"


class ParameterForbidden(DoesNotFit):
    """The configuration does not allow this parameter in a request."""

    code = "parameter_forbidden"


class NotSupported(DoesNotFit):
    """The model, or the engine that runs it, cannot do this."""

    code = "not_supported"


class ContextLengthExceeded(DoesNotFit):
    """Prompt and answer together are longer than the model's context."""

    code = "context_length_exceeded"


class EngineArgumentRefused(DoesNotFit):
    """The engine does not take an argument of the configuration."""

    code = "engine_argument_refused"


class EngineRefused(DoesNotFit):
    """The engine answered that the request is wrong."""

    code = "engine_refused"


class QueueFull(LLMKitError):
    """Too many requests wait for this model."""

    status, code = 429, "queue_full"


class BudgetExhausted(LLMKitError):
    """The user has no requests or tokens left for now, on a server that many people share."""

    status, code = 429, "budget_exhausted"


class RateLimited(LLMKitError):
    """The remote endpoint asks to slow down, and went on to after some tries."""

    status, code = 429, "rate_limited"


class EngineGone(LLMKitError):
    """The engine ended or cannot be reached."""

    status, code = 502, "engine_gone"


class EngineCrashed(EngineGone):
    """The engine of a loaded model ended without being asked to."""

    code = "engine_crashed"


class LoadFailed(EngineGone):
    """The engine did not become ready."""

    code = "load_failed"


class OutOfMemory(LoadFailed):
    """A device has not enough memory for the model."""

    code = "out_of_memory"


class KVCacheTooSmall(LoadFailed):
    """The KV cache has no room for a prompt of the wanted length."""

    code = "kv_cache_too_small"


class ModelGated(LoadFailed):
    """The owner of the model decides who may download it."""

    code = "model_gated"


class UnknownArchitecture(LoadFailed):
    """The engine cannot run models of this kind."""

    code = "unknown_architecture"


class LoadStalled(LoadFailed):
    """The engine showed no sign of life while it loaded."""

    code = "load_stalled"


class UpstreamUnreachable(EngineGone):
    """Nothing answers at the configured ``base_url``."""

    code = "upstream_unreachable"


class UpstreamRefusedKey(EngineGone):
    """The endpoint refused the key."""

    code = "upstream_refused_key"


class UpstreamFailed(EngineGone):
    """The endpoint failed, or answered something that is no answer."""

    code = "upstream_failed"


class NotReady(LLMKitError):
    """Not now; later perhaps."""

    status, code = 503, "not_ready"


class EngineNotInstalled(NotReady):
    """The package that runs this model type is missing, or cannot run on this system."""

    code = "engine_not_installed"


class ServerStopping(NotReady):
    """The server is going down."""

    code = "server_stopping"


class TimedOut(LLMKitError):
    """No answer within the time allowed."""

    status, code = 504, "timed_out"


class DiskFull(LLMKitError):
    """There is no room on the disk."""

    status, code = 507, "disk_full"


class ConnectError(LLMKitError):
    """The client could not talk to a server with llmkit."""

    status, code = 503, "connect_error"


class ServerNotFound(ConnectError):
    """No Jupyter server was found, or none answers."""

    code = "server_not_found"


class ExtensionMissing(ConnectError):
    """The server runs, but in an environment where llmkit is not installed."""

    code = "extension_missing"


class RestartNeeded(ConnectError):
    """The server was started before llmkit was installed."""

    code = "restart_needed"


class IncompatibleVersion(ConnectError):
    """Client and server speak different versions of the API."""

    code = "incompatible_version"


def _line_of_the_user(error: BaseException) -> list[str]:
    """Give the last line before llmkit's own that led to an error, if its text is known."""
    found: list[str] = []
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(Path(__file__).parent):
            break
        text = linecache.getline(str(path), number, frame.f_globals).strip()
        if text and "IPython" not in path.parts:
            found = [f"line {number}: {text}"]
    return found


def walk(root: type[LLMKitError] = LLMKitError) -> Iterator[type[LLMKitError]]:
    """Yield a class of the tree and everything below it, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from walk(child)


LOAD_ERRORS: tuple[type[LLMKitError], ...] = (
    RefusedByOperator,
    NoRoom,
    LoadCancelled,
    ModelLiveElsewhere,
    *walk(DoesNotFit),
    RateLimited,
    *walk(EngineGone),
    EngineNotInstalled,
    TimedOut,
    DiskFull,
)
"""What can be raised where a model is loaded."""

ASK_ERRORS: tuple[type[LLMKitError], ...] = tuple(
    dict.fromkeys(
        (
            ModelNotFound,
            WrongState,
            ModelNotLoaded,
            ModelUnloaded,
            RequestCancelled,
            QueueFull,
            BudgetExhausted,
            *LOAD_ERRORS,
        )
    )
)
"""What can be raised where a model is asked: a request may load it first."""


def from_wire(status: int, body: object) -> LLMKitError:
    """Make the error that a server's answer describes.

    Parameters
    ----------
    status
        HTTP status of the answer.
    body
        Its decoded JSON, or anything else when it was none.
    """
    error: Mapping[str, Any] = {}
    message = ""
    if isinstance(body, Mapping):
        if isinstance(body.get("error"), Mapping):
            error = body["error"]
        message = str(error.get("message") or body.get("message") or "")
    elif isinstance(body, str):
        message = body
    classes = list(walk())
    cls = next((c for c in classes if c.code == error.get("code")), None) or next(
        (c for c in classes if c.status == status), LLMKitError
    )
    return cls(
        message or f"The server answered {status}.",
        hint=error.get("hint"),
        param=error.get("param"),
        details=error.get("details"),
    )
