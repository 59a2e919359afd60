from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.engines.base import LoadProgress
from llmkit.engines.vllm.progress import DownloadMeter, LoadLog, clean
from llmkit.schemas import Download

REAL_LOG = re.split(r"[\r\n]+", (Path(__file__).parent / "data" / "start.log").read_text())


def test_the_log_of_a_real_start_gives_phases_in_order_and_a_fraction_that_grows() -> None:
    log = LoadLog()
    seen = [log.progress] + [log.progress for line in REAL_LOG if log.read(line)]
    assert list(dict.fromkeys(progress.phase for progress in seen)) == ["starting", "weights", "warming"]
    assert all((a.fraction or 0) <= (b.fraction or 0) for a, b in pairwise(seen))
    assert len(seen) >= 9
    assert seen[-1] == LoadProgress("warming", 0.99, "server")


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Fetching 7 files:  43%|####      | 3/7 [00:12<00:16,  4.01s/it]", "downloading"),
        ("model-00001-of-00002.safetensors:  13%|#3        | 639M/4.98G [00:05<00:40, 106MB/s]", "downloading"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.00s/it]", "weights"),
        ("Loading pt checkpoint shards:  50% Completed | 1/2", "weights"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|#####     | 5/10", "warming"),
        ("(Worker pid=7) INFO 11-23 18:08:51 [gpu_model_runner.py:1] Model loading took 14.99 GiB and 3 s", "warming"),
        ("(EngineCore pid=7) INFO 11-23 18:08:52 [x.py:1] GPU KV cache size: 32,768 tokens", "warming"),
        ("\x1b[32mINFO\x1b[0m 11-23 18:08:51 [x.py:68] Starting to load model x...", "weights"),
    ],
)
def test_lines_of_downloads_shards_and_graphs_are_known(line: str, phase: str) -> None:
    log = LoadLog()
    assert log.read(line)
    assert log.progress.phase == phase


def test_bars_move_the_fraction_within_their_part() -> None:
    log = LoadLog()
    fractions = []
    for percent in (0, 50, 100):
        log.read(f"Loading safetensors checkpoint shards: {percent:3}% Completed | 1/2")
        fractions.append(log.progress.fraction)
    assert fractions == [0.7, 0.775, 0.85]


def test_what_goes_back_keeps_the_fraction() -> None:
    log = LoadLog()
    log.read("Loading weights took 3 seconds")
    log.read("Starting to load model draft...")
    assert log.progress == LoadProgress("weights", 0.85, "weights")


def test_weights_that_have_to_come_first_are_a_download_with_bytes_and_rate(tmp_path: Path) -> None:
    log, folder = LoadLog(), tmp_path / "blobs"
    folder.mkdir()
    (folder / "here already").write_bytes(bytes(1 << 20))
    assert not log.read(f"llmkit: to download: 2 files, {4 << 20} bytes, into {folder}")
    assert (log.download_bytes, log.download_folder) == (4 << 20, folder)
    meter = DownloadMeter(folder, log.download_bytes)
    assert meter.read(100.0) == Download(done_bytes=0, total_bytes=4 << 20)
    assert not log.downloaded(meter.read(100.1))  # vLLM does not wait for them yet
    log.read("Starting to load model x...")
    assert log.progress.phase == "downloading"
    (folder / "weights.incomplete").write_bytes(bytes(2 << 20))
    half = meter.read(102.0)
    assert (half.done_bytes, half.bytes_per_second) == (2 << 20, 1 << 20)
    assert half.eta_seconds == ((half.total_bytes or 0) - (2 << 20)) / (1 << 20)
    assert log.downloaded(half)
    assert (log.progress.fraction, log.progress.download) == (0.6, half)
    (folder / "weights.incomplete").write_bytes(bytes(5 << 20))
    assert log.downloaded(meter.read(103.0))
    assert (log.progress.phase, log.progress.download) == ("weights", None)


@given(st.text(max_size=5000))
def test_unknown_lines_are_passed_over(line: str) -> None:
    log = LoadLog()
    log.read(line)
    assert 0 <= (log.progress.fraction or 0) < 1


PIECES = st.sampled_from(
    [*REAL_LOG, "\r", "\x1b[2K", " 120%", "999999999999%", "-5%", "to download 7 bytes to /x", "\x00"]
)


@given(st.lists(st.lists(PIECES | st.text(max_size=20), max_size=4).map("".join), max_size=30))
def test_whatever_a_log_says_and_in_whatever_order_the_fraction_only_grows(lines: list[str]) -> None:
    log = LoadLog()
    seen = [log.progress]
    for line in lines:
        before = log.progress
        assert log.read(line) == (log.progress != before)
        seen.append(log.progress)
    assert all(0 <= (a.fraction or 0) <= (b.fraction or 0) < 1 for a, b in pairwise(seen))
    assert all(progress.phase in ("starting", "downloading", "weights", "warming") for progress in seen)


def test_what_vllm_puts_before_its_words_is_taken_off() -> None:
    assert clean("(APIServer pid=8) INFO 11-23 18:08:53 [entry.py:136] Supported tasks: []\n") == "Supported tasks: []"
    assert clean("ValueError: it says (so) [here]") == "ValueError: it says (so) [here]"
