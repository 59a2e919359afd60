"""The benchmarks themselves: figures come out, and what fails makes them fail."""

from __future__ import annotations

import pytest

from benchmarks import bars, relay, report, run
from benchmarks.contenders import http_request
from benchmarks.loadgen import Job
from benchmarks.payloads import BROKEN, CHUNKS, DONE, chat_body, stream_events, wrong_stream
from benchmarks.processes import BenchmarkError, Generator, Upstream

pytestmark = pytest.mark.alone

QUICK = relay.Settings(rounds=1, seconds=0.3, warmup=0.05, clients=(2,), contenders=("upstream", "bare", "llmkit"))


def test_relay_figures() -> None:
    figures = relay.measure(QUICK)

    assert list(figures) == ["plain", "stream", "paced"]
    for kind, cases in figures.items():
        for case in cases.values():
            for name in QUICK.contenders:
                assert case[name]["requests_per_s"] > 0
                assert case[name]["cpu_ms_per_request"] > 0
                assert case[name]["latency_p50_ms"] <= case[name]["latency_p90_ms"]
                assert ("chunks_per_s" in case[name]) == (kind != "plain")
    tables = report.tables("relay", figures)
    assert len(tables) == 3
    assert all("bare" in table.text() and "| bare |" in table.markdown() for table in tables)


def test_bars() -> None:
    def case(**rates: float) -> dict[str, object]:
        return {
            name: {"rounds": [{"requests_per_s": rate, "cpu_ms_per_request": 1 / rate}]} for name, rate in rates.items()
        }

    found = bars.bars("relay", {"plain": {"16": case(bare=10.0, llmkit=8.0, litellm=2.0)}})

    assert [(bar.what, bar.passes) for bar in found] == [
        ("CPU per request, to bare, 16 clients", True),
        ("requests/s, to LiteLLM, 16 clients", False),
    ]


def test_broken_upstream_fails() -> None:
    settings = relay.Settings(rounds=1, seconds=0.3, clients=(2,), contenders=("upstream",), mode=BROKEN)

    with pytest.raises(BenchmarkError, match="500"):
        relay.measure(settings)


def test_failed_request_fails() -> None:
    with Upstream() as upstream, Generator() as generator:
        request = http_request("/v1/chat/completions", "none", chat_body("mock", stream=True, mode=BROKEN), stream=True)
        job = Job(request=request, check="stream", clients=2, warmup=0.0, seconds=0.1, port=upstream.port)

        with pytest.raises(BenchmarkError, match=r"2 failed requests.*This upstream is broken"):
            generator.run(job, "upstream")


def test_failure_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: relay.Settings) -> None:
        raise BenchmarkError("2 failed requests")

    monkeypatch.setattr(relay, "measure", fail)

    assert run.main(["relay", "--quick"]) == 1
    assert "FAILED: 2 failed requests" in capsys.readouterr().err


def test_stream_check_sees_what_is_missing() -> None:
    events = stream_events()

    assert wrong_stream(b"".join(events) + DONE + b"\n\n") is None
    assert wrong_stream(b"".join(events)) is not None
    assert wrong_stream(b"".join(events[1:]) + DONE) is not None
    assert wrong_stream(b"".join(reversed(events)) + DONE) is not None
    assert len(events) == CHUNKS
