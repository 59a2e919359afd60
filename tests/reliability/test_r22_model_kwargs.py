"""R22: of vLLM's options those of one table can be asked for, each becomes one word, and nothing becomes another."""

from __future__ import annotations

import difflib
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import REPOSITORY, JupyterServer, scaled
from vllm_arguments import EVERY_ARGUMENT, run_parser

from llmkit.engines.base import sort_kwargs
from llmkit.engines.vllm.arguments import NO_FLAGS, VLLMArguments, to_flags
from llmkit.engines.vllm.engine import VLLMEngineType
from llmkit.errors import DoesNotFit
from llmkit.schemas import GenerationParameters

OPTIONS = (REPOSITORY / "tests" / "data" / "vllm_options.txt").read_text("utf-8").split()
"""Of ``vllm serve`` 0.32; the installed one's are tried beside real vLLM."""
TABLE = frozenset(VLLMArguments.model_fields)
TAKEN = TABLE | frozenset(GenerationParameters.model_fields) | {"engine", "generation"}
GENERATED = scaled(5000)
TYPE = VLLMEngineType()
DANGEROUS_VALUES: list[Any] = [
    "x",
    "x\n--trust-remote-code",
    "--trust-remote-code",
    "-O3",
    "=x",
    "x --config=/etc/passwd",
    "x\0y",
    "x\ry",
    '{"a": 1}',
    "@/etc/passwd",
    "../../etc/passwd",
    "$(id)",
    "\u2028--port=80",
    "",
    {"a": {"b": 1}},
    {"config": "/etc/passwd"},
    {"--config": "/etc/passwd"},
    {"a.b": "--config"},
    ["--config", "/etc/passwd"],
    True,
    False,
    0,
    -1,
    1 << 70,
    1e308,
    None,
]


def spellings(option: str) -> list[str]:
    """Give the ways in which somebody may try to name an option."""
    bare = option.lstrip("-")
    name = bare.replace("-", "_")
    return [
        name,
        bare if bare != name else f"{bare}-",
        option,
        name.upper(),
        f"{name}.x",
        f"{name}=1",
        f"{name} ",
        f"{name}\n--config",
        f"no_{name}",
    ]


def flags_of(model_kwargs: dict[str, Any]) -> list[str]:
    """Give the flags that an engine would be started with, or raise `DoesNotFit`."""
    return to_flags(VLLMArguments.model_validate(sort_kwargs(TYPE, model_kwargs).engine))


def name_of(flag: str) -> str:
    """Give the argument that a flag sets."""
    name, has_value, _ = flag.partition("=")
    assert name.startswith("--"), flag
    name = name.removeprefix("--")
    if not has_value and name.startswith("no-"):
        name = name.removeprefix("no-")
    return name.replace("-", "_")


def complaint_of(key: str, value: Any) -> str | None:
    """Say what is wrong with what becomes of one argument."""
    given_names = {key} if key not in ("engine", "generation") else set(value) if isinstance(value, dict) else set()
    try:
        flags = flags_of({key: value})
    except DoesNotFit as error:
        fields = error.details["fields"]
        if error.status != 422 or not fields[0]["path"].startswith("model_kwargs"):
            return f"refused in another form: {error.to_wire()}"
        near = difflib.get_close_matches(key, TAKEN - {"engine", "generation"}, n=1, cutoff=0.9)
        if near and key not in TAKEN and "did you mean `" not in fields[0]["message"]:
            return f"the nearest name, {near[0]}, is not told: {fields[0]['message']}"
        return None
    if not given_names <= TAKEN:
        return f"taken: {flags}"
    if len(flags) > len(given_names) or {name_of(flag) for flag in flags} - given_names:
        return f"became something else: {flags}"
    return f"not one plain word: {flags}" if any(set("\0\n\r\u2028") & set(flag) for flag in flags) else None


def test_r22_every_option_of_vllm_is_in_the_table_or_refused_however_it_is_spelt() -> None:
    wrong, tried, taken = [], 0, set()
    for option in OPTIONS:
        for key in spellings(option):
            # Of an unknown name no value matters.
            for value in DANGEROUS_VALUES if key in TAKEN else DANGEROUS_VALUES[:2]:
                for model_kwargs in ({key: value}, {"engine": {key: value}}):
                    tried += 1
                    ((outer, inner),) = model_kwargs.items()
                    why = complaint_of(outer, inner)
                    wrong += [(model_kwargs, why)] if why else []
        name = option.lstrip("-").replace("-", "_")
        if name in EVERY_ARGUMENT:
            (flag,) = flags_of({"engine": {name: EVERY_ARGUMENT[name]}})
            assert name_of(flag) == name
            taken.add(name)
    print(
        f"\nR22: {len(OPTIONS)} options of vLLM, {tried} arguments: {len(taken)} options can be asked for, "
        f"{len(wrong)} became something else"
    )
    assert len(OPTIONS) >= 300
    assert wrong == []
    assert taken == TABLE - NO_FLAGS


VALUES = st.sampled_from(DANGEROUS_VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
NAMES = st.sampled_from(sorted(TAKEN)) | st.sampled_from(OPTIONS).flatmap(lambda one: st.sampled_from(spellings(one)))


@st.composite
def mistyped(draw: st.DrawFn) -> str:
    """Give a name with a letter lost, added or changed."""
    name = draw(NAMES)
    at = draw(st.integers(0, len(name)))
    return name[:at] + draw(st.sampled_from(["", "-", "_", "--", ".", "=", "\0", "\n", " "])) + name[at + 1 :]


def test_r22_generated_arguments() -> None:
    tried = taken = 0

    @settings(
        max_examples=GENERATED, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(NAMES | mistyped() | st.text(max_size=30), VALUES)
    def one(key: str, value: Any) -> None:
        nonlocal tried, taken
        tried += 1
        assert complaint_of(key, value) is None
        taken += key in TAKEN

    one()
    print(f"\nR22: {tried} generated arguments, {taken} of them with a name of the table: none became something else")
    assert tried >= GENERATED
    assert 0 < taken < tried


def test_r22_the_server_refuses_with_422_and_stores_nothing() -> None:
    names = sorted({option.lstrip("-").replace("-", "_") for option in OPTIONS} - TAKEN)
    wrong = []
    with JupyterServer() as server:
        for key in names:
            body = {"model_id": "m", "model_name": "some/model", "model_type": "vllm", "model_kwargs": {key: "x"}}
            answer = server.request("POST", "llm/configure_model/", json=body)
            if answer.status_code != 422 or answer.json()["error"]["param"] != f"model_kwargs.{key}":
                wrong.append((key, answer.status_code, answer.text[:200]))
        stored = server.request("GET", "llm/configurations/").json()
    print(f"\nR22: {len(names)} options that are not in the table, sent to a server: {len(wrong)} not refused by name")
    assert len(names) >= 300
    assert wrong == []
    assert stored == []


@pytest.mark.vllm
def test_r22_the_installed_vllm_changes_nothing_but_what_was_asked_for() -> None:
    """What its own parser makes of the flags: dotted names, JSON and files cannot bring in anything."""
    chance = random.Random(22)
    some: list[dict[str, Any]] = [{name: value} for name, value in EVERY_ARGUMENT.items()]
    for _ in range(scaled(100)):
        names = chance.sample(sorted(EVERY_ARGUMENT), chance.randint(2, 12))
        some.append({name: EVERY_ARGUMENT[name] for name in names})
    for name in EVERY_ARGUMENT:
        for value in DANGEROUS_VALUES:
            try:
                flags_of({"engine": {name: value}})
            except DoesNotFit:
                continue
            some.append({name: value})
    options, (default, *parsed) = run_parser([[], *(flags_of({"engine": one}) for one in some)])
    changed_else = [
        (one, others)
        for one, now in zip(some, parsed, strict=True)
        if now and (others := {name for name in default if now[name] != default[name]} - set(one))
    ]
    unknown = {option for option in options if option.lstrip("-").replace("-", "_") not in TABLE}
    not_refused = [option for option in unknown for key in spellings(option) if complaint_of(key, "x")]
    print(
        f"\nR22: {len(options)} options of the installed vLLM, {len(unknown)} of them refused; "
        f"{len(some)} sets of arguments through its parser ({sum(not now for now in parsed)} refused by it): "
        f"{len(changed_else)} changed something else"
    )
    assert default
    assert changed_else == []
    assert not_refused == []
    assert set(EVERY_ARGUMENT) <= {option.lstrip("-").replace("-", "_") for option in options}
