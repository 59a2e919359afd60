"""GET /llm/openapi.json: every route is in it, it is what OpenAPI wants, and its examples answer as written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_story import Teller, story_server
from support import REPOSITORY, own_environment
from tornado import web
from tornado.routing import PathMatches, RuleRouter

from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.handlers.base import METHODS, LLMHandler, UnknownPathHandler
from jupyter_server_ext.openapi import EVENTS, described, document, examples
from llmkit import errors

SPEC = (REPOSITORY / "tests" / "data" / "llm_api.md").read_text(encoding="utf-8")
CHANGING = frozenset(
    {
        "cpu",
        "created",
        "cores",
        "elapsed_seconds",
        "epoch",
        "free_bytes",
        "evictable_bytes",
        "journal_mode",
        "limited_by",
    }
    | {
        "created_at",
        "expires_at",
        "load_seconds",
        "loaded_at",
        "last_used_at",
        "gpus",
        "reason",
        "request_id",
        "started_at",
        "status",
        "phase",
    }
    | {"timings", "total_bytes", "updated_at", "used_bytes", "version", "standby_bytes", "revision", "fits", "progress"}
)
"""What differs from one run, machine or version to the next; the schema says what it may be."""
STATES = ("get_devices", "get_health", "get_models", "get_model", "load_model", "get_requests", "configure_model")
"""Only in answers about states do `status`, `reason` and the like change."""
TOO_LONG = ("get_model_types", "get_open_api")
"""Their examples would be longer than all the rest; they are schemas themselves."""
NOWHERE = {
    "internal_error": "a defect of the server is not promised",
    "not_found": "no operation is at an unknown path",
    "method_not_allowed": "no operation is at another method",
    "not_authenticated": "Jupyter answers 403",
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return document(ROUTES, "/a%40b/", ("openai", "vllm"))


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Give the document of a real server, and every example with what that server answered."""
    with story_server() as (server, upstream):
        answer = server.request("GET", "llm/openapi.json")
        assert answer.status_code == 200, answer.text
        teller = Teller(server, upstream)
        yield answer.json(), [(example, teller.send(example)) for example in examples()]


def operations(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["operationId"]: one for methods in made["paths"].values() for one in methods.values()}


def validator(made: dict[str, Any], schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """Give what checks a value by a schema of the document."""
    return jsonschema.Draft202012Validator({**schema, "components": made["components"]})


def test_it_is_valid_openapi(made: dict[str, Any]) -> None:
    assert made["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(made).validate()


async def test_every_route_of_the_live_router_is_in_it(app: Any, call: Any, jp_serverapp: Any) -> None:
    answer = await call("GET", "llm/openapi.json")
    assert answer.status == 200
    assert answer.json["servers"][0]["url"] == jp_serverapp.base_url.rstrip("/")
    routed = [(rule.matcher.regex, rule.target) for rule in _rules(jp_serverapp.web_app.default_router)]
    ours = {handler for _, handler in routed if isinstance(handler, type) and issubclass(handler, LLMHandler)}
    found = {UnknownPathHandler}
    for path, methods in answer.json["paths"].items():
        address = jp_serverapp.base_url.rstrip("/") + re.sub(r"[{}]", "", path)
        handler = next(handler for pattern, handler in routed if pattern.match(address))
        assert set(methods) == {m for m in METHODS if getattr(handler, m) is not getattr(LLMHandler, m)}, path
        found.add(handler)
    assert found == ours == {handler for _, handler in ROUTES}


def _rules(router: Any) -> Iterator[Any]:
    """Yield the rules of a router and of the routers in it that have a path, in the order in which they are asked."""
    for rule in router.rules:
        if isinstance(rule.target, RuleRouter):
            yield from _rules(rule.target)
        elif isinstance(rule.matcher, PathMatches):
            yield rule


def test_a_route_that_is_not_described_says_what_to_add() -> None:
    class Undescribed(LLMHandler):
        @web.authenticated
        def get(self) -> None:
            """Answer."""

    with pytest.raises(TypeError, match=r"Undescribed\.get is not described.*write @describes\("):
        list(described([(r"/llm/new/?", Undescribed)]))


def test_every_operation_is_told_in_full(made: dict[str, Any]) -> None:
    told = [one for methods in made["paths"].values() for one in methods.values()]
    assert len(operations(made)) == len(told), "an operationId is there twice"
    tags = {tag["name"] for tag in made["tags"]}
    for one in told:
        name = one["operationId"]
        assert one["summary"], name
        assert set(one["tags"]) <= tags
        assert one["x-jupyter-authorization"]["action"] in ("read", "write", "execute")
        for parameter in one.get("parameters", []):
            assert parameter["description"], name
            assert parameter["schema"]["type"], name
        for status, answer in one["responses"].items():
            assert answer["description"], (name, status)
            for kind, content in answer["content"].items():
                assert ("schema" in content) == (kind != EVENTS), (name, status)
        if name not in TOO_LONG:
            assert any("examples" in content for content in one["responses"]["200"]["content"].values()), (
                f"{name} has no example: add one to openapi_examples.json and run tests/openapi_story.py"
            )
    for path, methods in made["paths"].items():
        for method, one in methods.items():
            assert (method == "get") == (one["x-jupyter-authorization"]["action"] == "read"), path


def test_every_endpoint_of_the_specification_is_in_it_as_written(made: dict[str, Any]) -> None:
    endpoints = re.findall(r"^#### `(\w+) (\S+)`", SPEC, re.MULTILINE)
    assert len(endpoints) == 8
    for method, path in endpoints:
        assert method.lower() in made["paths"][path]


def test_the_examples_of_the_specification_are_among_its_examples() -> None:
    blocks = [json.loads(block) for block in re.findall(r"-d '(\{.*?\})'\n", SPEC, re.DOTALL)]
    assert len(blocks) == 2
    answers = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC, re.DOTALL)]
    assert len(answers) == 8
    shown = [example.get("body") for example in examples()]
    for body in blocks:
        assert body in shown

    def says(answer: Any, documented: Any) -> bool:
        if isinstance(documented, dict) and isinstance(answer, dict):
            return (
                documented.keys() <= answer.keys() and documented.items() <= {k: answer[k] for k in documented}.items()
            )
        return bool(answer == documented)

    for documented in answers:
        assert any(says(example["answer"], documented) for example in examples() if "answer" in example), documented


def test_every_code_of_an_error_is_in_it(made: dict[str, Any]) -> None:
    kept = {error.code for error in errors.walk() if not issubclass(error, errors.ConnectError)}
    ours = {error.code for error in errors.walk() if error.__module__ == errors.__name__} & kept
    shown: set[str] = set()
    for one in operations(made).values():
        for status, answer in one["responses"].items():
            if status.startswith(("4", "5")) and status != "4XX":
                shown |= set(answer["content"]["application/json"]["examples"])
    assert ours - shown == NOWHERE.keys()
    assert kept <= set(made["components"]["schemas"]["ErrorDetail"]["properties"]["code"]["enum"])


def test_every_example_of_the_document_fits_its_schema(made: dict[str, Any]) -> None:
    count = 0
    for one in operations(made).values():
        for content in _contents(one):
            for example in content.get("examples", {}).values():
                validator(made, content["schema"]).validate(example["value"])
                count += 1
    assert count > 100


def _contents(one: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (one.get("requestBody", {}), *one["responses"].values()):
        for kind, content in part.get("content", {}).items():
            if kind != EVENTS:
                yield content


def test_every_example_answers_as_written(told: Any) -> None:
    made, story = told
    for example, answered in story:
        where = f"{example['operation']}: {example['says']}"
        assert answered["status"] == example["status"], (where, answered)
        if "events" in example:
            assert _events(answered["events"]) == _events(example["events"]), where
            continue
        content = operations(made)[example["operation"]]["responses"][str(example["status"])]["content"]
        schema = next(iter(content.values()))["schema"]
        validator(made, schema).validate(answered["answer"])
        _assert_same(answered["answer"], example["answer"], where, loose=example["operation"] in STATES)
    print(f"\nOpenAPI: {len(operations(made))} operations, {len(story)} examples answered as written")


def _events(text: str) -> list[Any]:
    """Give the events of a stream without what differs from one answer to the next."""
    found: list[Any] = []
    for event in text.split("\n\n"):
        data = event.removeprefix("data: ")
        told = json.loads(data) if data.startswith("{") else data
        found.append({k: v for k, v in told.items() if k not in CHANGING} if isinstance(told, dict) else told)
    return found


def _assert_same(answer: Any, written: Any, where: str, *, loose: bool) -> None:
    if isinstance(written, dict):
        assert isinstance(answer, dict), where
        assert list(answer) == list(written), where
        for key, value in written.items():
            if key not in CHANGING or (not loose and key in ("status", "reason", "revision")):
                _assert_same(answer[key], value, f"{where}: {key}", loose=loose)
    elif isinstance(written, list):
        assert isinstance(answer, list), where
        assert len(answer) == len(written), where
        for one, other in zip(answer, written, strict=True):
            _assert_same(one, other, where, loose=loose)
    else:
        assert answer == written, where


def test_the_extension_is_imported_without_making_it() -> None:
    program = "import sys, jupyter_server_ext; print([m for m in sys.modules if m.startswith('jupyter_server_ext.')])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=own_environment()
    )
    assert done.stdout.strip() == "[]"


async def test_a_method_that_is_not_possible_is_a_405_that_says_which_are(call: Any) -> None:
    for method, path in (("DELETE", "llm/models/"), ("POST", "llm/configuration/x"), ("PATCH", "llm/inference")):
        answer = await call(method, path)
        one = next(rule for rule in ROUTES if re.fullmatch(rule[0], f"/{path}"))[1]
        own = [name.upper() for name in METHODS if getattr(one, name) is not getattr(LLMHandler, name)]
        assert (answer.status, answer.json["error"]["code"]) == (405, "method_not_allowed")
        assert answer.headers["Allow"].split(", ") == own


async def test_a_refusal_before_the_body_is_read_says_that_the_connection_closes(
    app: Any, jp_http_port: int, jp_base_url: str, jp_auth_header: dict[str, str]
) -> None:
    base = f"http://127.0.0.1:{jp_http_port}{jp_base_url}llm/load_model/"
    async with httpx.AsyncClient(headers=jp_auth_header, trust_env=False, timeout=60) as client:
        answer = await client.post(f"{base}%ff")
        assert (answer.status_code, answer.headers["Connection"]) == (400, "close")
        assert (await client.post(f"{base}x")).headers.get("Connection") != "close"
