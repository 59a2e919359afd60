"""R10: two servers on one home: no update is lost, both end with the same list, neither ends the other's engine."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from programs import RegistryProgram, left
from support import scaled, wait_until

from llmkit.registry.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

OPERATIONS = scaled(1000)
SHARED = 8
LONGEST_SECONDS = 10.0
"""No operation takes so long; a deadlock does."""
EXPECTED_REFUSALS = {"configuration_exists", "configuration_not_found", "model_live_elsewhere"}


@dataclass
class Write:
    """A confirmed write, with the time it was asked for and the time it was confirmed."""

    config_id: str
    description: str | None
    """None: deleted."""
    asked: float
    confirmed: float


@dataclass
class Worker:
    """Drives one server from a thread of its own."""

    program: RegistryProgram
    name: str
    writes: list[Write] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def call(self, do: str, **fields: Any) -> dict[str, Any]:
        started = time.monotonic()
        told = self.program.call(do, **fields)
        self.seconds.append(time.monotonic() - started)
        if "error" in told:
            assert told["error"] in EXPECTED_REFUSALS, told
            self.refusals[told["error"]] += 1
        return told

    def run(self) -> None:
        rng = random.Random()
        known: dict[str, str] = {}
        for number in range(OPERATIONS):
            if number % 50 == 0:
                known = {c["model_id"]: c["config_id"] for c in self.program.ok("configurations")}
            # Half of it on what only this server uses, half on what both fight for.
            name = f"{self.name}{rng.randrange(SHARED)}" if rng.random() < 0.5 else f"shared{rng.randrange(SHARED)}"
            description: str | None = f"{self.name} {number}"
            asked = time.monotonic()
            body = {"model_id": name, "model_name": "any", "model_type": "fake", "description": description}
            if name not in known:
                told = self.call("configure", **body)
            elif rng.random() < 0.75:
                told = self.call("update", config_id=known[name], **body)
            else:
                told, description = self.call("delete", config_id=known[name]), None
            if "ok" in told:
                config_id = known.get(name) or told["ok"]
                self.writes.append(Write(config_id, description, asked, time.monotonic()))
            if told.get("ok") and description:
                known[name] = told["ok"]
            elif told.get("error") == "configuration_exists":
                known |= {c["model_id"]: c["config_id"] for c in self.program.ok("configurations")}
            else:
                known.pop(name, None)


def listed(program: RegistryProgram) -> dict[str, Any]:
    return {c["model_id"]: c for c in program.ok("configurations")}


def test_r10_two_servers_on_one_home(tmp_path: Path) -> None:
    run_base = Path(os.environ["LLMKIT_RUN_DIR"])
    state = tmp_path / "state"
    with RegistryProgram(state, run_base) as one, RegistryProgram(state, run_base) as other:
        workers = [Worker(one, "one"), Worker(other, "other")]
        engines = []
        for worker in workers:
            fields = {"model_id": f"live-{worker.name}", "model_name": "any", "model_type": "fake"}
            config_id = worker.program.ok("configure", **fields)
            assert worker.program.ok("load", config_id=config_id) == "loaded"
            engines.append((config_id, [process.pid for process in worker.program.guardians()]))
        for program, (config_id, _) in zip((other, one), engines, strict=True):
            wait_until(lambda p=program: len(listed(p)) == 2, "both know both")  # type: ignore[misc]
            assert program.call("delete", config_id=config_id)["error"] == "model_live_elsewhere"

        started = time.monotonic()
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(Worker.run, workers))
        took = time.monotonic() - started

        store = Store(state)
        stored = {c.model_id: c.to_wire() for c in store.all()}
        store.close()
        wait_until(lambda: listed(one) == stored == listed(other), "the same list in both", 3.0)
        check_no_write_is_lost(
            [write for worker in workers for write in worker.writes],
            {c["config_id"]: c["description"] for model_id, c in stored.items() if not model_id.startswith("live-")},
        )
        for worker, (_, pids) in zip(workers, engines, strict=True):
            assert worker.program.ok("status")[f"live-{worker.name}"][0] == "loaded"
            assert [process.pid for process in worker.program.guardians()] == pids
            assert len(worker.seconds) == OPERATIONS
    assert left(run_base) == []
    seconds = sorted(second for worker in workers for second in worker.seconds)
    assert seconds[-1] < LONGEST_SECONDS
    p50, p99 = statistics.median(seconds), seconds[int(len(seconds) * 0.99)]
    refused = dict(workers[0].refusals + workers[1].refusals)
    print(
        f"\nR10: 2 x {OPERATIONS} operations in {took:.1f} s, 0 updates lost, refused: {refused}; "
        f"p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, at most {seconds[-1] * 1000:.0f} ms"
    )


def check_no_write_is_lost(writes: list[Write], stored: dict[str, str]) -> None:
    """What was confirmed is there unless its deletion was, as the last write left it; of two at once either is last."""
    by_config: dict[str, list[Write]] = {}
    for write in writes:
        by_config.setdefault(write.config_id, []).append(write)
    deleted = {write.config_id for write in writes if write.description is None}
    assert set(stored) == set(by_config) - deleted
    for config_id, found in stored.items():
        last_asked = max(write.asked for write in by_config[config_id])
        assert found in [w.description for w in by_config[config_id] if w.confirmed >= last_asked], config_id
