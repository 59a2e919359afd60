"""The long run, short: that it works on a real server with fake engines, and that it would notice growth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

sys.path.insert(0, str(Path(__file__).parent))  # a program, and its modules beside it

import long_run  # noqa: E402
import long_run_figures as figures  # noqa: E402

SHORT = long_run.Settings(seconds=10.0, warm_up=5.0, interval=0.5)


@pytest.mark.alone
def test_a_short_run_does_all_kinds_of_work_and_nothing_grows() -> None:
    told = long_run.run(SHORT)
    print("\n" + figures.table({name: told[name] for name in ("rest_before", "rest_after")}) + f"\n{told['done']}")
    kinds = {
        "streams",
        "left streams",
        "loads",
        "configurations",
        "conversations",
        "looks",
        "kernels",
        "kernel restarts",
    }
    assert kinds <= told["done"].keys()
    # Ten seconds are too short for medians of work, in which a load more or less counts: rest is what is compared.
    assert [words for words in told["findings"] if not words.startswith("in work")] == []


@pytest.mark.alone
def test_a_leak_is_found() -> None:
    told = long_run.run(long_run.Settings(seconds=8.0, warm_up=2.0, interval=0.2, rest=4.0, env={"PROBE_LEAKS": "1"}))
    found = "\n".join(told["findings"])
    for words in ("at rest: files", "at rest: tasks", "at rest: rss_mib", "at rest: pss_mib", "in work: pss_mib"):
        assert f"{words} has grown" in found, found


def test_growth_is_what_is_more_than_tolerated() -> None:
    flat = [{"seconds": float(n), **dict.fromkeys(figures.IN_WORK, 100.0)} for n in range(50)]
    assert figures.summary(flat, [flat[0], flat[-1]])["findings"] == []
    for name in figures.IN_WORK:
        grown = [{**sample, name: 100.0 + 2 * number} for number, sample in enumerate(flat)]
        (words, *_) = figures.summary(grown, [flat[0], flat[-1]])["findings"]
        assert words == f"in work: {name} has grown from 129.0 to 189.0"
    warm = [{**sample, "rss_mib": min(100.0, 50.0 + 10 * number)} for number, sample in enumerate(flat)]
    assert figures.summary(warm, [flat[0], flat[-1]])["findings"] == []
    with pytest.raises(ValueError, match="five samples"):
        figures.fifths(flat[:4])


def test_the_program_has_a_help_and_its_figures_can_be_kept(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, long_run.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--engine" in done.stdout
    source = long_run.write({"samples": [], "findings": []}, SHORT, tmp_path)
    assert json.loads(source.read_text())["long_run"]["figures"]["findings"] == []
