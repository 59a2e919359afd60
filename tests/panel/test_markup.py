from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmkit.errors import LoadFailed, ServerNotFound
from llmkit.panel import markup
from llmkit.schemas import Capabilities, Memory, Model, ModelError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def model(**fields: Any) -> Model:
    base = {"model_id": "m", "config_id": "c", "model_name": "n", "model_type": "vllm"}
    return Model.model_validate({**base, **fields})


@pytest.mark.parametrize(
    "made",
    [
        markup.model_head(model(model_id=HOSTILE)),
        markup.model_facts(model(model_name=HOSTILE, model_type=HOSTILE, owner=HOSTILE, status="loaded"), NOW),
        markup.model_facts(model(status="loaded", capabilities={"engine_version": HOSTILE}), NOW),
        markup.error_card(ModelError(code="x", message=HOSTILE, hint=HOSTILE, log_tail=[HOSTILE, HOSTILE])),
        markup.error_card(LoadFailed(HOSTILE, hint=HOSTILE, details={"log_tail": [HOSTILE]})),
        markup.no_server(ServerNotFound(HOSTILE, hint=HOSTILE, details={"tried": [HOSTILE]})),
        markup.note(HOSTILE),
        markup.hint(HOSTILE),
        markup.field_error(HOSTILE),
        markup.note(markup.freed(Memory(reason=HOSTILE))),
        markup.header("connected", HOSTILE),
    ],
)
def test_whatever_is_said_stays_text(made: str) -> None:
    assert "<script" not in made
    assert "<img" not in made
    assert "&lt;script&gt;" in made


def facts(**fields: Any) -> str:
    return markup.model_facts(model(**fields), NOW)


def test_a_loaded_model_shows_what_is_known_and_nothing_else() -> None:
    assert "Loaded" in markup.model_head(model(status="loaded"))
    assert "None" not in facts(status="loaded")
    full = facts(
        status="loaded",
        load_seconds=61.5,
        memory=Memory(pss_bytes=1610612736, gpu_bytes=512 << 20).model_dump(),
        capabilities=Capabilities(max_model_len=4096).model_dump(),
    )
    for part in ("4,096 tokens", "1.5 GiB RAM", "512 MiB GPU", "loaded in 1 min 2 s"):
        assert part in full


def test_the_version_of_the_engine_follows_its_name_where_it_is_known() -> None:
    assert ">vllm 0.11.0 · n<" in facts(status="loaded", capabilities={"engine_version": "0.11.0"})
    assert ">vllm · n<" in facts(status="loaded")


def test_numbers_that_change_do_not_announce_the_status_again() -> None:
    busy = model(status="loaded", in_flight=2)
    assert markup.model_head(busy) == markup.model_head(model(status="loaded"))
    assert "role" not in markup.model_facts(busy, NOW)


@pytest.mark.parametrize(
    ("running", "waiting", "said"),
    [(0, 0, "no requests"), (1, 0, "1 running"), (2, 1, "2 running, 1 waiting"), (0, 3, "0 running, 3 waiting")],
)
def test_requests_are_counted(running: int, waiting: int, said: str) -> None:
    assert said in facts(status="loaded", in_flight=running, queued=waiting)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "unloads now if idle"),
        (42.2, "unloads in 42 s if idle"),
        (240, "unloads in 4 min if idle"),
        (7200, "unloads in 2 h if idle"),
        (9000, "unloads in 2 h 30 min if idle"),
    ],
)
def test_when_an_idle_model_goes_is_told(seconds: float, said: str) -> None:
    expires_at = NOW + timedelta(seconds=seconds)
    assert said in facts(status="loaded", expires_at=expires_at)
    assert "unloads" not in facts(status="loaded", expires_at=expires_at, in_flight=1)
    assert "unloads" not in facts(status="loaded")


def test_what_a_fix_does_is_said() -> None:
    assert markup.fix_words({"a": 1, "b": "x"}) == "Set a to 1 and b to x and load again"


def test_why_a_model_is_not_loaded_and_what_follows_is_told() -> None:
    assert "idle for 60 s" in facts(status="unloaded", reason="idle for 60 s")
    assert "in use by http://other:8888/" in facts(owner="http://other:8888/")
    error = {"code": "engine_crashed", "message": "vLLM was ended by signal 9."}
    failed = facts(status="failed", reason="vLLM was ended by signal 9. It is started again in 4 s.", error=error)
    assert "It is started again in 4 s" in failed
    assert "signal 9" not in failed


def test_a_load_shows_phase_share_seconds_and_what_is_left() -> None:
    label = markup.load_label(model(status="loading", phase="weights", progress=0.5, eta_seconds=8), 12.3)
    assert "Loading the weights · 50% · 12 s · about 8.0 s left" in label
    assert markup.load_label(model(status="loading"), None) == '<span class="llmkit-phase">Loading</span>'


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (Memory(pss_bytes=1610612736, verified=True), "Unloaded; freed 1.5 GiB of RAM."),
        (Memory(pss_bytes=1024, gpu_bytes=2048), "Unloaded; freed 2 KiB of GPU memory and 1 KiB of RAM, not verified."),
        (Memory(reason="runs elsewhere"), "Unloaded; runs elsewhere."),
        (Memory(), "Unloaded."),
    ],
)
def test_an_unload_says_what_was_freed(memory: Memory, said: str) -> None:
    assert markup.freed(memory) == said


def test_the_end_of_the_log_is_folded_and_readable() -> None:
    card = markup.error_card(ModelError(code="x", message="no", log_tail=["one", "two"]))
    assert "<details>" in card
    assert "one\ntwo" in card
    assert "<details>" not in markup.error_card(ModelError(code="x", message="no"))


def test_without_a_server_the_card_says_what_was_tried_and_what_to_start() -> None:
    error = ServerNotFound("None was found. Tried:\n  - here", hint="Start one.", details={"tried": ["here: no"]})
    card = markup.no_server(error)
    assert "<b>None was found.</b>" in card
    assert "<li>here: no</li>" in card
    assert "jupyter lab" in card


def test_what_stands_between_backticks_is_shown_as_code() -> None:
    card = markup.error_card(LoadFailed("no", hint="Run `pip <x>`, then\n`that`."))
    assert "Run <code>pip &lt;x&gt;</code>, then<br><code>that</code>." in card
