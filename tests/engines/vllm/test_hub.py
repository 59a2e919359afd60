"""What a load will download, by the hub's real library against a hub of the tests; and a real download by vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from llmkit.demo import demo_model_path
from llmkit.engines.base import EngineContext, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm.engine import VLLMEngineType
from llmkit.engines.vllm.failures import explain
from llmkit.errors import DiskFull, DoesNotFit, LLMKitError, ModelGated, ModelNameNotFound
from llmkit.schemas import Configuration

TOKEN = "hf_canary0123456789"
PLAN = """
import sys
from llmkit.engines.vllm.hub import plan_download
name, revision, free = sys.argv[1:]
lines, sensible = plan_download(name, revision or None, (lambda path: int(free)) if free else None)
print("\\n".join(lines))
sys.exit(0 if sensible else 3)
"""
DOWNLOAD = "import sys, huggingface_hub; huggingface_hub.snapshot_download(sys.argv[1])"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"some/demo": demo_model_path()}) as running:
        yield running


def run(code: str, hub: FakeHub, home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: the library reads its variables when it is imported.
    environment = {**os.environ, **hub.environment(home), **environ}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def plan(
    hub: FakeHub, home: Path, name: str = "some/demo", revision: str = "", free: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    return run(PLAN, hub, home, name, revision, free, **environ)


def test_what_is_to_come_is_known_to_the_byte(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path)
    wanted = [p for p in demo_model_path().iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".txt")]
    size = sum(path.stat().st_size for path in wanted)
    folder = tmp_path / "hub" / "models--some--demo" / "blobs"
    assert done.stdout.strip() == f"llmkit: to download: {len(wanted)} files, {size} bytes, into {folder}"
    assert done.returncode == 0


def test_what_is_here_is_not_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    assert run(DOWNLOAD, hub, tmp_path, "some/demo").returncode == 0
    assert plan(hub, tmp_path).stdout.strip() == ""
    (tmp_path / "hub" / "models--some--demo" / "snapshots" / COMMIT / "config.json").unlink()
    assert "to download: 1 files" in plan(hub, tmp_path).stdout


def test_a_disk_that_is_too_small_is_told_before_anything_comes(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, free="1000")
    assert done.returncode == 3
    assert isinstance(explain(done.stdout.splitlines(), "some/demo", 1), DiskFull)
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]


@pytest.mark.parametrize(
    ("name", "revision", "kind"),
    [
        ("nobody/nothing", "", ModelNameNotFound),
        ("some/gated", "", ModelGated),
        ("some/demo", "no-such-branch", DoesNotFit),
    ],
)
def test_a_model_that_cannot_be_had_is_told_by_its_reason(
    hub: FakeHub, tmp_path: Path, name: str, revision: str, kind: type[LLMKitError]
) -> None:
    hub.models["some/gated"] = demo_model_path()
    hub.gated.add("some/gated")
    done = plan(hub, tmp_path, name, revision)
    assert done.returncode == 3, done.stderr
    assert type(explain(done.stdout.splitlines(), name, 1)) is kind


def test_offline_nobody_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout.strip()) == (0, "")
    assert hub.asked == []


def test_a_hub_that_is_not_there_does_not_end_the_load(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0
    assert "did not say" in done.stdout


def test_the_token_goes_to_the_hub_and_is_never_printed(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, HF_TOKEN=TOKEN)
    assert f"Bearer {TOKEN}" in [header for _, _, header in hub.asked], hub.asked
    for name in ("some/demo", "nobody/nothing"):
        done = plan(hub, tmp_path, name, HF_TOKEN=TOKEN)
        assert TOKEN not in done.stdout + done.stderr


def make_larger(folder: Path, size: int) -> Path:
    """Copy the demo model with so many bytes more in the head of its weights: the library writes 10 MB at a time."""
    shutil.copytree(demo_model_path(), folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    head["__metadata__"] = {**head.get("__metadata__", {}), "padding": "x" * size}
    longer = json.dumps(head).encode()
    longer += b" " * (-len(longer) % 8)
    weights.write_bytes(len(longer).to_bytes(8, "little") + longer + data[8 + length :])
    return folder


@pytest.mark.vllm
async def test_vllm_loads_a_model_from_a_hub_and_says_how_far_it_is(hub: FakeHub, tmp_path: Path) -> None:
    hub.models["some/demo"] = make_larger(tmp_path / "larger", 60 << 20)
    hub.bytes_per_second = 15 << 20
    run_dir = Path(os.environ["LLMKIT_RUN_DIR"])
    kwargs = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 128, "enforce_eager": True}
    configuration = Configuration(
        config_id="c", model_id="m", model_name="some/demo", model_type="vllm", model_kwargs=kwargs
    )
    context = EngineContext(run_dir / "e", run_dir / "e.log", None, logging.getLogger("test"))
    engine = VLLMEngineType(environ={**os.environ, **hub.environment(tmp_path)}).create(configuration, context)
    reports: list[LoadProgress] = []
    try:
        await engine.start(reports.append)
        http = EngineHTTP(engine.endpoint)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = await http.json("POST", "/chat/completions", {"model": "m", "messages": messages, "temperature": 0})
        await http.close()
    finally:
        freed = await asyncio.wait_for(engine.stop(), 30)
    assert freed.verified
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    downloads = [report.download for report in reports if report.download is not None]
    done = [download.done_bytes for download in downloads]
    assert len(set(done)) >= 4, done
    assert done == sorted(done)
    assert all(download.total_bytes and download.done_bytes <= download.total_bytes for download in downloads)
    assert any(download.bytes_per_second and download.eta_seconds is not None for download in downloads)
    fractions = [report.fraction or 0.0 for report in reports]
    assert fractions == sorted(fractions)
    print(f"\n{len(downloads)} reports of a download of {downloads[-1].total_bytes} bytes, last {downloads[-1]}")
