"""R11: no orphan after a SIGKILL of the server or of the guardian. R12: nor after both, from the next start on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import RegistryProgram, left
from support import scaled, wait_until

from llmkit.process import guardian

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

PHASES = ("starting", "weights", "warming", "loaded")
OPTIONS = ("", "--setsid", "--setsid --ignore-sigterm")
KILL_CYCLES = scaled(24)
GUARDIAN_CYCLES = scaled(6)
DOUBLE_CYCLES = scaled(10)
GONE_SECONDS = 10.0


@pytest.fixture
def run_base() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


def reach(program: RegistryProgram, phase: str, options: str) -> str:
    """Bring a fake engine into a phase of its load; give the model_id."""
    stall = "" if phase == "loaded" else f" --stall-at={phase}"
    config_id = program.ok("configure", model_id="m", model_name=f"any {options}{stall}".strip(), model_type="fake")
    program.ok("load", config_id=config_id, wait=phase == "loaded")
    if phase != "loaded":
        log = program.folder / f"{config_id}.log"
        words = {"starting": "non-default", "weights": "Initializing", "warming": "Loading weights took"}[phase]
        wait_until(lambda: log.exists() and words in log.read_text(), phase)
    return "m"


def test_r11_no_orphan_after_the_servers_sigkill(tmp_path: Path, run_base: Path) -> None:
    slowest = 0.0
    for number in range(KILL_CYCLES):
        state = tmp_path / str(number)
        with RegistryProgram(state, run_base) as program:
            reach(program, PHASES[number % 4], OPTIONS[number // 4 % 3])
            time.sleep(random.uniform(0, 0.05))
            program.kill()
            started = time.monotonic()
            wait_until(lambda: not left(run_base), f"cycle {number}: the end of {left(run_base)}", GONE_SECONDS)
            slowest = max(slowest, time.monotonic() - started)
            engine_folders = [entry for entry in program.folder.iterdir() if entry.is_dir()]
            assert engine_folders == []
    print(f"\nR11: {KILL_CYCLES} SIGKILLs of the server over {len(PHASES)} phases: 0 left, at most {slowest:.2f} s")


def test_r11_the_guardians_end_alone_fails_the_model_and_leaves_nothing(tmp_path: Path, run_base: Path) -> None:
    slowest = 0.0
    for number in range(GUARDIAN_CYCLES):
        with RegistryProgram(tmp_path / str(number), run_base) as program:
            reach(program, PHASES[3 - number % 2], OPTIONS[number % 3])
            (keeper,) = program.guardians()
            guardian.send(keeper, signal.SIGKILL)
            started = time.monotonic()
            wait_until(lambda program=program: program.ok("status")["m"][0] == "failed", "failed", GONE_SECONDS)  # type: ignore[misc]
            assert "guardian" in program.ok("status")["m"][1]
            wait_until(
                lambda program=program: not [e for e in program.folder.iterdir() if e.is_dir()],  # type: ignore[misc]
                "the end of the engine",
                GONE_SECONDS,
            )
            slowest = max(slowest, time.monotonic() - started)
        assert left(run_base) == []
    print(f"\nR11: {GUARDIAN_CYCLES} SIGKILLs of the guardian alone: model failed, 0 left, at most {slowest:.2f} s")


def test_r12_what_a_double_kill_left_is_reaped_at_the_next_start(tmp_path: Path, run_base: Path) -> None:
    with subprocess.Popen(["sleep", "600"], env={"LLMKIT_ENGINE_ID": "another"}) as foreign:
        survivors = reaped = 0
        for number in range(DOUBLE_CYCLES):
            state = tmp_path / str(number)
            with RegistryProgram(state, run_base) as program:
                reach(program, PHASES[number % 4], "--setsid --ignore-sigterm")
                keepers = program.guardians()
                program.process.send_signal(signal.SIGSTOP)  # so that it does not do the guardian's work
                for keeper in keepers:
                    guardian.send(keeper, signal.SIGKILL)
                program.kill()
            survivors += len(left(run_base))
            with RegistryProgram(state, run_base) as successor:
                reaped += successor.reaped
                assert [p for p in left(run_base) if str(successor.process.pid) not in p and "fake_engine" in p] == []
            assert left(run_base) == []
        assert foreign.poll() is None, "a foreign process was signalled"
        foreign.kill()
    assert survivors > 0, "nothing was left, so nothing was tested"
    print(f"\nR12: {DOUBLE_CYCLES} double kills: {survivors} processes left by them, {reaped} engines reaped, 0 left")
