"""Bounds of what a request gives to an engine's grammar compiler, and of what it lets the engine fetch."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import DoesNotFit
from llmkit.inference import bounds
from llmkit.inference.bounds import check_media, check_schemas, grammar_fault, pattern_fault

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+( [A-Z][a-z]+)*$", "description": "Whole name"},
        "code": {"type": "string", "pattern": r"^\d{3}-[a-f0-9]{1,64}$"},
        "pattern": {"type": "string"},
        "child": {"$ref": "#"},
    },
    "required": ["name"],
}
TOOL = {"type": "function", "function": {"name": "save", "parameters": SCHEMA}}


def refused(body: dict[str, Any], at: str = "") -> str:
    """Give the path that a request is refused for, or nothing."""
    try:
        check_schemas(body, at)
    except DoesNotFit as error:
        return str(error.param)
    return ""


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None, "tools": None, "text": {"format": {"type": "text"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"tools": [TOOL] * 128},
        {"guided_json": json.dumps(SCHEMA), "guided_regex": r"(\w+\s)*\w+", "guided_choice": ["yes", "no"]},
        {"structured_outputs": {"regex": r"[^@\s]{1,64}@[a-z0-9.-]{1,255}"}},
        {"guided_grammar": 'root ::= "(" root ")" | "x"'},
        {"guided_json": "no JSON", "response_format": {"json_schema": {"schema": nested(40)}}},
    ],
)
def test_usual_requests_pass(body: dict[str, Any]) -> None:
    assert refused(body) == ""


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"guided_regex": "a" * 5000}, "guided_regex"),
        ({"guided_regex": "(a+)+$"}, "guided_regex"),
        ({"structured_outputs": {"regex": "(x{1,1000}){1,1000}"}}, "structured_outputs.regex"),
        ({"guided_grammar": "root ::= " + "(" * 40 + ")" * 40}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "x" * 70_000}}, "structured_outputs.grammar"),
        ({"tools": [TOOL, {"function": {"parameters": {"pattern": "(a*)*"}}}]}, "tools.1.function.parameters.pattern"),
        (
            {"tools": [{"parameters": {"patternProperties": {"(a*)*": {}}}}]},
            "tools.0.parameters.patternProperties.(a*)*",
        ),
        ({"tools": [{"parameters": {"$ref": "file:///etc/passwd"}}]}, "tools.0.parameters.$ref"),
        ({"guided_json": {"$ref": "http://169.254.169.254/"}}, "guided_json.$ref"),
        (
            {"guided_json": json.dumps({"properties": {"x": {"pattern": "(a|b*)+"}}})},
            "guided_json.properties.x.pattern",
        ),
        ({"text": {"format": {"schema": {"pattern": "(a+)+"}}}}, "text.format.schema.pattern"),
        ({"tools": [{"type": "custom", "format": {"definition": "(" * 99}}]}, "tools.0.format.definition"),
    ],
)
def test_what_a_compiler_may_not_be_given_is_named_by_its_path(body: dict[str, Any], path: str) -> None:
    assert refused(body) == path
    assert refused(body, "inference_kwargs") == f"inference_kwargs.{path}"


def test_size_depth_and_all_patterns_together_have_a_bound() -> None:
    deep = {"response_format": {"json_schema": {"schema": nested(60)}}}
    assert refused(deep).startswith("response_format.json_schema.schema.items.")
    assert refused({"guided_json": json.dumps(nested(60))}).startswith("guided_json.items.")
    assert refused({"guided_choice": ["x"] * (bounds.MAX_SCHEMA_VALUES + 1)}) == "guided_choice"
    assert refused({"guided_choice": ["x" * (bounds.MAX_SCHEMA_CHARACTERS // 2 + 1)] * 2}) == "guided_choice.1"
    many = [{"pattern": f"{number}{'a' * 4000}"} for number in range(bounds.MAX_PATTERNS // 4000 + 1)]
    assert refused({"tools": many}).endswith(".pattern")
    assert refused({"tools": many[:8]}) == ""


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+", "(a*)*", "(a|b+)*", "((a+))+", "((a+)?)+", "(?:a*b?)+", "(?<name>a+){2,}", "(?P<n>[ab]+)*",
        "(\\w+){5}", "(a+|b)*c", "a{10001}", "((a{1,100}){1,100}){2}", "(" * 40 + "a" + ")" * 40,
    ],
)  # fmt: skip
def test_tangled_patterns_are_refused(pattern: str) -> None:
    assert pattern_fault(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "", "a+", "(a+)", "(ab+)+", "(a+b)*", "[(a+)+]", r"\(a+\)+", "(a|b)*", "(a?)", "a{2,3}", "a{", "a{x}", "{1}",
        ")+", "(", "[", "\\", "(?<", "(?P<", r"\p{L}+", r"(\p{Lu}\p{Ll}*)+", r"(?=a+)b",
        "(?:[0-9]{1,3}\\.){3}[0-9]{1,3}", "([a-z]+,)*[a-z]+",
    ],
)  # fmt: skip
def test_common_and_wrong_patterns_are_left_to_the_engine(pattern: str) -> None:
    assert pattern_fault(pattern) is None


@given(st.text(alphabet="ab()|*+?{}[],12\\^$<=!P:'\"", max_size=80))
def test_no_text_makes_the_look_at_patterns_and_grammars_fail(text: str) -> None:
    for fault in (pattern_fault(text), grammar_fault(text)):
        assert fault is None or re.match("repeats|has groups", fault)


@pytest.mark.alone
def test_a_look_at_a_usual_request_costs_microseconds_and_at_the_largest_little() -> None:
    plain = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 0.5}
    agent = {**plain, "tools": [TOOL] * 10}
    largest = {**plain, "guided_choice": ["x" * 20] * (bounds.MAX_SCHEMA_VALUES - 1)}
    pattern = {**plain, "tools": [{"pattern": "[ab]{1,9}(ab?)" * 292}] * 16}

    def microseconds(body: dict[str, Any], times: int) -> float:
        best = 1e9
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(times):
                check_schemas(body)
                check_media(body, is_ours=True)
            best = min(best, (time.perf_counter() - began) / times * 1e6)
        return best

    told = {
        "plain": microseconds(plain, 1000),
        "ten tools": microseconds(agent, 100),
        "50,000 values": microseconds(largest, 1),
        "64 KiB of patterns": microseconds(pattern, 1),
    }
    print("\nmicroseconds: " + ", ".join(f"{name} {value:.1f}" for name, value in told.items()))
    assert told["plain"] < 100
    assert told["ten tools"] < 5_000
    assert max(told.values()) < 250_000


# -- media -------------------------------------------------------------------------------------------------

PICTURE = "data:image/png;base64,aGk="


def part(kind: str, url: Any) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
@pytest.mark.parametrize(
    "scheme", ["http://10.0.0.1/x", "HTTPS://host/x", "file:///etc/passwd", "ftp://h/x", " data:x", ""]
)
@pytest.mark.parametrize("way", ["dict", "text", "text beside", "nested", "responses"])
def test_an_engine_of_this_machine_is_given_no_address_to_fetch(kind: str, scheme: str, way: str) -> None:
    found: dict[str, Any] = {
        "dict": {"messages": [{"role": "user", "content": [part(kind, scheme)]}]},
        "text": {"messages": [{"role": "user", "content": [{"type": kind, kind: scheme}]}]},
        "text beside": {"messages": [{"role": "user", "content": ["a", {kind: scheme, "uuid": "x"}]}]},
        "nested": {"messages": [{"role": "tool", "content": [{"type": "x", "content": [part(kind, scheme)]}]}]},
        "responses": {"input": [{"role": "user", "content": [{"type": "input_image", kind: scheme}]}]},
    }[way]
    with pytest.raises(DoesNotFit) as caught:
        check_media(found, is_ours=True, at="inference_kwargs")
    assert str(caught.value.param).startswith("inference_kwargs.")
    assert str(caught.value.param).endswith(kind)
    assert scheme.strip() not in caught.value.message or not scheme.strip()


def test_data_urls_pass_everywhere_and_addresses_to_endpoints_elsewhere() -> None:
    for ours in (True, False):
        check_media({"messages": [{"role": "user", "content": [part("image_url", PICTURE)]}]}, is_ours=ours)
        check_media({"messages": [{"content": "see http://host"}], "input": [1, 2, [3]]}, is_ours=ours)
        check_media({"messages": [{"content": [{"image_url": None, "uuid": "x"}]}], "input": "http://x"}, is_ours=ours)
    check_media({"messages": [{"content": [part("image_url", "https://host/x.png")]}]}, is_ours=False)
    with pytest.raises(DoesNotFit):
        check_media({"messages": [{"content": [part("image_url", "file:///etc/passwd")]}]}, is_ours=False)


@pytest.mark.parametrize("kind", ["image_embeds", "audio_embeds", "prompt_embeds", "image_pil"])
def test_objects_that_an_engine_would_unpack_are_refused(kind: str) -> None:
    with pytest.raises(DoesNotFit):
        check_media({"messages": [{"content": [{"type": kind, kind: "gASV"}]}]}, is_ours=True)
