"""The OpenAPI document of the API: made from the routes, the handlers' methods and the pydantic models.

What is said of an operation stands beside its method, see `operations`; nothing is written here by hand. The examples
(``openapi_examples.json``) are requests to a real server with its answers, one after the other as a story; a test
sends them again.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, TypeAdapter

from jupyter_server_ext import answers
from jupyter_server_ext.handlers.base import METHODS, RESOURCE, LLMHandler, UnknownPathHandler
from jupyter_server_ext.operations import Operation, action_of, operation_of
from llmkit import errors, schemas, tool_keys
from llmkit._version import __version__
from llmkit.errors import LLMKitError

OPENAPI: Final = "3.1.0"
EXAMPLES: Final = Path(__file__).with_name("openapi_examples.json")
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
_REF: Final = "#/components/schemas/{model}"
_ENGINE_ERROR: Final = {"description": "The engine's own words.", "type": "object"}
_GROUP: Final = re.compile(r"\(([^()]+)\)")
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
PATH_PARAMETERS: Final[dict[str, Any]] = {
    "config_id": Annotated[str, Field(description="The ID that configuring the model gave.")],
    "model_id": schemas.ModelId,
    "request_id": Annotated[schemas.RequestId, Field(description="Of the answer's X-Request-Id, or chosen by you.")],
    "conversation_id": schemas.ConversationId,
    "name": tool_keys.KeyName,
}
"""Types of what stands in a path, by the name of the method's argument."""
ABOUT: Final = """Configure, load, prompt and unload language models on a Jupyter server.

Every path works with and without its trailing slash. Bodies are strict UTF-8 JSON objects, whatever their content type
says: no NaN or Infinity, no lone surrogates, at most 64 levels. Times are ISO 8601 in UTC, durations seconds, sizes
bytes; what could not be measured is null. An error is always of the form `ErrorAnswer`, and its `code` says what went
wrong.

The server asks its authorizer before each operation: `read`, `execute` or `write` on `llm`."""
SECURITY: Final = {
    "token": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "The server's token, as `token TOKEN`.",
    },
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "The server's token, as OpenAI's clients send a key.",
    },
    "query": {
        "type": "apiKey",
        "in": "query",
        "name": "token",
        "description": "The server's token in the address, which logs and histories keep: use a header where you can.",
    },
}


@dataclass(frozen=True)
class Described:
    """One operation of the document."""

    path: str
    method: str
    handler: type[LLMHandler]
    choice: str | None
    """Which of several paths of its route it is."""
    operation: Operation

    @property
    def function(self) -> Callable[..., Any]:
        """The handler's method."""
        found: Callable[..., Any] = getattr(self.handler, self.method)
        return found

    @property
    def id(self) -> str:
        """Its ``operationId``."""
        words = _WORD.sub("_", self.handler.__name__.removesuffix("Handler")).lower()
        verb = "" if self.method == "post" else f"{self.method}_"
        return verb + words + (f"_{self.choice.replace('/', '_')}" if self.choice else "")

    @property
    def body(self) -> Any:
        """Model of the request's body, or None."""
        body = self.operation.body
        return body[self.choice] if isinstance(body, dict) else body

    @property
    def path_parameters(self) -> list[str]:
        """Names of what stands in its path."""
        return re.findall(r"\{(\w+)\}", self.path)


def described(handlers: Iterable[Sequence[Any]]) -> Iterator[Described]:
    """Yield every operation of an app's routes.

    Raises
    ------
    TypeError
        If one is not described; the message says what to add.
    """
    for pattern, handler, *_ in handlers:
        if not (isinstance(handler, type) and issubclass(handler, LLMHandler)) or handler is UnknownPathHandler:
            continue
        for method in METHODS:
            function = getattr(handler, method)
            if function is getattr(LLMHandler, method):  # Tornado's own, which answers 405
                continue
            operation = operation_of(function)
            if operation is None:
                raise TypeError(
                    f"{handler.__module__}.{handler.__name__}.{method} is not described for /llm/openapi.json: write "
                    "@describes(answer=TheAnswersModel, errors=(TheErrors,)) above its @web.authenticated, with body= "
                    "and query= if it reads them; see jupyter_server_ext/operations.py."
                )
            names = [name for name in inspect.signature(function).parameters if name != "self"]
            for path, choice in _paths(pattern, handler, names):
                yield Described(path, method, handler, choice, operation)


def document(handlers: Iterable[Sequence[Any]], base_url: str, model_types: Iterable[str]) -> dict[str, Any]:
    """Make the document.

    Parameters
    ----------
    handlers
        The routes of the app: pattern and handler class.
    base_url
        Of the Jupyter server, for example ``/user/ada/``.
    model_types
        Names of the model types that this server has.
    """
    operations = list(described(handlers))
    types, components = _schemas(operations)
    for name in ("ModelConfigRequest", "StoredConfigRequest"):
        components[name]["properties"]["model_type"]["enum"] = sorted(model_types)
    paths: dict[str, Any] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method] = _operation(one, types, operations)
    tags = {_tag(one.handler): _lines(sys.modules[one.handler.__module__])[0] for one in operations}
    return {
        "openapi": OPENAPI,
        "info": {
            "title": "llmkit",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "servers": [{"url": base_url.rstrip("/") or "/", "description": "This Jupyter server."}],
        "security": [{name: []} for name in SECURITY],
        "tags": [{"name": name, "description": said} for name, said in tags.items()],
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items())), "securitySchemes": SECURITY},
    }


def errors_of(one: Described) -> list[type[LLMKitError]]:
    """Give every error that an operation can answer with, by status."""
    found: list[type[LLMKitError]] = [errors.NotAllowed, errors.NotReady, errors.ServerStopping]
    if one.body is not None or one.operation.query or one.operation.headers or one.path_parameters:
        found.append(errors.MalformedRequest)
    if one.body is not None:
        found += [errors.TooLarge, errors.DoesNotFit]
    return sorted(dict.fromkeys([*found, *one.operation.errors]), key=lambda error: error.status)


@cache
def examples() -> list[dict[str, Any]]:
    """Give the story: ``operation``, what is sent, and ``status`` and ``answer``."""
    told: list[dict[str, Any]] = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    return told


# -- parts of it -------------------------------------------------------------------------------------------


def _paths(pattern: str, handler: type[LLMHandler], names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the paths that a route's pattern stands for, each with its choice if there are several."""
    plain = pattern.removesuffix("/?").replace("\\", "")
    group = _GROUP.search(plain)
    if group is not None and "|" in group[1]:
        for choice in group[1].split("|"):
            yield plain.replace(group[0], choice), choice
        return
    for name in names:
        plain = _GROUP.sub(f"{{{name}}}", plain, count=1)
    # A handler's first line shows its path as people write it.
    yield plain + ("/" if f"{plain}/`" in (handler.__doc__ or "") else ""), None


def _operation(one: Described, types: dict[Any, Any], operations: list[Described]) -> dict[str, Any]:
    summary, rest = _lines(one.function)
    action = action_of(one.function)
    told: dict[str, Any] = {
        "operationId": one.id,
        "tags": [_tag(one.handler)],
        "summary": summary.rstrip("."),
        "description": "\n\n".join(filter(None, [rest, f"Needs `{action}` on `{RESOURCE}`."])),
        "x-jupyter-authorization": {"action": action, "resource": RESOURCE},
    }
    parameters = [_path_parameter(name, one) for name in one.path_parameters]
    for place, declared in (("query", one.operation.query), ("header", one.operation.headers)):
        parameters += [
            {"name": p.name, "in": place, "description": p.description, "schema": p.schema()} for p in declared
        ]
    if parameters:
        told["parameters"] = parameters
    if one.body is not None:
        content = {"schema": types[one.body, "validation"]} | _shown(one, "body")
        told["requestBody"] = {"required": True, "content": {JSON: content}}
    told["responses"] = _responses(one, types, operations)
    return told


def _path_parameter(name: str, one: Described) -> dict[str, Any]:
    schema = TypeAdapter(PATH_PARAMETERS[name]).json_schema()
    told = {"name": name, "in": "path", "required": True, "description": schema.pop("description"), "schema": schema}
    shown = next((example["path"][name] for example in examples() if example["operation"] == one.id), None)
    return told if shown is None else {**told, "example": shown}


def _responses(one: Described, types: dict[Any, Any], operations: list[Described]) -> dict[str, Any]:
    operation = one.operation
    ok: dict[str, Any] = {"description": operation.streams or "Done.", "content": {}}
    ok["content"][operation.text or JSON] = {"schema": types[operation.answer, "serialization"]} | _shown(one, 200)
    if operation.streams:
        ok["content"][EVENTS] = _shown(one, 200, events=True)  # OpenAPI 3.1 has no schema of a stream's events
    if operation.answer_headers:
        ok["headers"] = {k: _header(said, {"type": "string"}) for k, said in operation.answer_headers.items()}
    if links := _links(one, operations):
        ok["links"] = links
    told = {"200": ok}
    for status, answer in operation.others.items():
        content = {JSON: {"schema": types[answer, "serialization"]} | _shown(one, status)}
        told[str(int(status))] = {"description": f"{HTTPStatus(status).phrase}.", "content": content}
    refused = types[answers.ErrorAnswer, "serialization"]
    for error in errors_of(one):
        is_passed_on = operation.engine_errors and error.status < HTTPStatus.INTERNAL_SERVER_ERROR
        schema = {"anyOf": [refused, _ENGINE_ERROR]} if is_passed_on else refused
        entry = told.setdefault(
            str(error.status), {"description": "", "content": {JSON: {"schema": schema, "examples": {}}}}
        )
        said = _lines(error)[0]
        entry["description"] += f"- `{error.code}`: {said}\n"
        entry["content"][JSON]["examples"][error.code] = {"value": error(said).to_wire()}
        if error.status == HTTPStatus.TOO_MANY_REQUESTS:
            entry["headers"] = {"Retry-After": _header("Seconds to wait.", {"type": "integer"})}
    if operation.engine_errors:
        told["4XX"] = {"description": _ENGINE_ERROR["description"], "content": {JSON: {"schema": _ENGINE_ERROR}}}
    return told


def _header(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "schema": schema}


def _links(one: Described, operations: list[Described]) -> dict[str, Any]:
    """Give what can follow: operations that take in their path what this one answers."""
    if one.method not in ("post", "put"):
        return {}
    kinds = get_args(one.operation.answer) or (one.operation.answer,)
    given = getattr(kinds[0], "model_fields", {})
    return {
        f"{target.id}_by_{name}": {"operationId": target.id, "parameters": {name: f"$response.body#/{name}"}}
        for target in operations
        for name in target.path_parameters
        if name in given
    }


def _shown(one: Described, what: int | Literal["body"], *, events: bool = False) -> dict[str, Any]:
    """Give the examples of a body or of an answer with a status."""
    found = {}
    for number, example in enumerate(examples()):
        if example["operation"] != one.id:
            continue
        if what == "body":
            value = example.get("body")
        else:
            value = example.get("events" if events else "answer") if example.get("status") == what else None
        if value is not None:
            found[f"{one.id}_{number}"] = {"summary": example["says"], "value": value}
    return {"examples": found} if found else {}


def _schemas(operations: list[Described]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Give the schema of every type, by type and mode, and the components that they refer to."""
    wanted: dict[tuple[Any, Literal["validation", "serialization"]], None] = {
        (answers.ErrorAnswer, "serialization"): None
    }
    for one in operations:
        if one.body is not None:
            wanted[one.body, "validation"] = None
        for answer in (one.operation.answer, *one.operation.others.values()):
            wanted[answer, "serialization"] = None
    adapters = [(kind, mode, TypeAdapter[Any](kind)) for kind, mode in wanted]
    by_type, rest = TypeAdapter.json_schemas(adapters, ref_template=_REF)
    components = rest["$defs"]
    for module in (schemas, answers):
        _add_docstrings(module, components)
    for name, schema in components.items():
        if "description" in schema:
            schema["description"] = _markdown(schema["description"])
        schema["title"] = name
    components["ErrorDetail"]["properties"]["code"]["enum"] = sorted(error.code for error in errors.walk())
    return dict(by_type), components


def _add_docstrings(module: Any, components: dict[str, Any]) -> None:
    """Add what stands below the fields of a module's models."""
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, said in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if (
                isinstance(said, ast.Expr)
                and isinstance(said.value, ast.Constant)
                and isinstance(said.value.value, str)
            ):
                for suffix in ("", "-Input", "-Output"):
                    schema = components.get(node.name + suffix, {}).get("properties", {}).get(field.target.id)
                    if schema is not None:
                        schema["description"] = _markdown(inspect.cleandoc(said.value.value))


def _tag(handler: type[LLMHandler]) -> str:
    return handler.__module__.rpartition(".")[2].replace("openai_api", "OpenAI's API")


def _lines(documented: Any) -> tuple[str, str]:
    """Give the first paragraph of a docstring, and the rest, as Markdown."""
    summary, _, rest = inspect.cleandoc(documented.__doc__ or "").partition("\n\n")
    return _markdown(summary), _markdown(rest)


def _markdown(text: str) -> str:
    return text.replace("``", "`")
