"""R3: whatever fits the API's own description, and whatever does not, is answered as that description says.

schemathesis makes requests from ``/llm/openapi.json``: right ones and wrong ones, with NUL, one after the other
along the links, and sees that each answer has a documented status, content type and form.
"""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from openapi_story import story_server
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events
from support import JupyterServer, scaled

CASES = scaled(200)
SCENARIOS = scaled(50)
P99_MS, LONGEST_MS = 10.0, 250.0
"""As R16 wants it while this runs."""
FOLLOWING = "GET /llm/models/{model_id}/logs"
MOST_FOLLOWED = 5
DECLARED = [
    {"model_id": "loaded", "model_name": "gpt-3", "model_type": "openai", "auto_load": True},
    {"model_id": "instant", "model_name": "llmkit/demo", "model_type": "vllm", "auto_load": True},
]
"""Nothing that is made up deletes these, and a request loads them again."""


def settings(server: JupyterServer) -> SchemathesisConfig:
    """Give what schemathesis is to do."""
    asked = {"dictionary": "models", "probability": 0.7}
    return SchemathesisConfig.from_dict(
        {
            "base-url": server.url.rstrip("/"),
            "headers": {"Authorization": f"token {server.token}"},
            "continue-on-failure": True,
            "request-timeout": 10.0,
            "dictionaries": {"models": {"values": [*(one["model_id"] for one in DECLARED), "nobody"]}},
            "parameters": {"body.model": asked, "body.model_id": asked},
            "generation": {
                "max-examples": CASES,
                "mode": "all",
                "allow-x00": True,
                "no-shrink": True,
                "database": "none",
                "with-security-parameters": False,  # test_r01 is about those
                "deterministic": "LLMKIT_SOAK" not in os.environ,
            },
            "phases": {"stateful": {"generation": {"max-examples": SCENARIOS}}},
            "checks": {
                "positive_data_acceptance": {"enabled": False},  # a schema cannot say all that makes a 422
                "ignored_auth": {"enabled": False},
                "missing_required_header": {"enabled": False},
            },
            "operations": [
                # A log that is followed has no end: it is read for so long.
                {"include-name": FOLLOWING, "request-timeout": 1.0},
                # A request that was answered is over, and cannot be ended any more.
                {
                    "include-name": "DELETE /llm/inference/{request_id}",
                    "checks": {"ensure_resource_availability": {"enabled": False}},
                },
                # What an engine makes of a body is the engine's affair, and ours here takes all.
                {"include-path-regex": "^/llm/v1/", "checks": {"negative_data_rejection": {"enabled": False}}},
            ],
        }
    )


def api_of(server: JupyterServer, document: dict[str, Any]) -> Any:
    """Give what schemathesis knows of the API."""
    api = schemathesis.openapi.from_dict(document, config=settings(server))
    followed = 0

    @api.hook
    def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
        nonlocal followed
        if query and context.operation.label == FOLLOWING and query.get("follow") is True:
            followed += 1
            if followed > MOST_FOLLOWED:  # each takes as long as hundreds of others
                return {**query, "follow": False}
        return query

    return api


@pytest.fixture(autouse=True)
def connections_are_closed() -> Iterator[None]:
    """Close here what schemathesis leaves open, so that no other test is blamed for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.alone
@pytest.mark.timeout(scaled(900))  # thousands of requests, on a busy machine too
def test_r03_every_answer_is_one_that_the_document_promises() -> None:
    arguments = [f"--LLMKitApp.configurations={one!r}" for one in DECLARED]
    cases: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    answered: dict[str, set[int]] = {}
    failures: dict[tuple[str, str], str] = {}
    lateness: dict[str, tuple[float, float]] = {}
    began = time.monotonic()
    with story_server(extensions=["bench_loop"], more_args=arguments) as (server, _):
        document = server.request("GET", "llm/openapi.json").json()
        described = {one["operationId"] for methods in document["paths"].values() for one in methods.values()}
        for event in engine.from_schema(api_of(server, document)).execute():
            if isinstance(event, events.PhaseStarted):
                server.request("DELETE", "bench/loop")
            elif isinstance(event, events.PhaseFinished):
                told = server.request("GET", "bench/loop").json()
                lateness[event.phase.name.value] = (told["p99_ms"], told["max_ms"])
            elif isinstance(event, events.NonFatalError | events.FatalError):
                failures["schemathesis", repr(event)[:300]] = ""
            elif isinstance(event, events.ScenarioFinished):
                _note(event.recorder, cases, statuses, answered, failures)
        assert server.request("GET", "llm/health").json()["status"] == "ok"
        unexpected = [line for line in server.log.splitlines() if " failed: " in line or "Traceback" in line]
    print(
        f"\nR3: {sum(cases.values())} cases of {len(cases)} operations (up to {max(cases.values())} of one, set for "
        f"{CASES}; {sum(count < CASES for count in cases.values())} have fewer that differ) in "
        f"{time.monotonic() - began:.0f} s: {len(failures)} failures; "
        f"{', '.join(f'{count} x {status}' for status, count in sorted(statuses.items()))}"
    )
    late = ", ".join(f"{name} p99 {p99:.1f} ms and at most {most:.0f} ms" for name, (p99, most) in lateness.items())
    print(f"R16: during R3, the event loop was late by: {late}")
    assert not failures, json.dumps([[*where, said] for where, said in failures.items()], indent=1)
    assert not unexpected
    assert len(cases) == len(described)
    for name, seen in answered.items():
        assert 200 in seen, f"{name} was never used as it should be: {seen}"
    # Other programs of the machine can be in the way; the better of the two long phases counts.
    assert any(p99 <= P99_MS and most <= LONGEST_MS for p99, most in (lateness["coverage"], lateness["fuzzing"])), late


def _note(
    recorder: Any,
    cases: Counter[str],
    statuses: Counter[int],
    answered: dict[str, set[int]],
    failures: dict[tuple[str, str], str],
) -> None:
    """Note the cases of a scenario, and what was wrong with them."""
    for number, node in recorder.cases.items():
        label = node.value.operation.label
        cases[label] += 1
        interaction = recorder.interactions.get(number)
        if interaction is not None and interaction.response is not None:
            statuses[interaction.response.status_code] += 1
            answered.setdefault(label, set()).add(interaction.response.status_code)
        for check in recorder.checks.get(number, ()):
            if check.status is Status.FAILURE:
                failure = check.failure_info
                failures.setdefault((label, check.name), f"{failure.failure.message}\n{failure.code_sample}"[:2000])
