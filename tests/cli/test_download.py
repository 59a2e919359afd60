"""Get a model from a hub ahead of time, by the hub's real library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_hub import COMMIT, FakeHub
from support import wait_until

from llmkit.demo import demo_model_path

pytest.importorskip("huggingface_hub")

TOKEN = "hf_canary0123456789"
SIZE = 40 << 20


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "config.json").write_text("{}")
    (larger / "model.safetensors").write_bytes(os.urandom(SIZE))
    (larger / "model.bin").write_bytes(b"the same again")
    with FakeHub({"some/demo": demo_model_path(), "some/larger": larger}) as running:
        yield running


def start(hub: FakeHub, home: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmkit", "download", *words]
    environment = {**os.environ, **hub.environment(home), **environ}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def download(hub: FakeHub, home: Path, *words: str, **environ: str) -> tuple[int, str, str]:
    process = start(hub, home, *words, **environ)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_what_an_engine_loads_comes_and_the_folder_is_printed(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    status, out, err = download(hub, home, "some/larger")
    folder = home / "hub" / "models--some--larger" / "snapshots" / COMMIT
    assert (status, out) == (0, f"{folder}\n")
    assert "2 files, 40 MiB to download" in err
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    asked = len(hub.asked)
    status, out, err = download(hub, home, "some/larger", "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["path"], told["downloaded_bytes"], told["files"]) == (str(folder), 0, 2)
    assert not [path for method, path, _ in hub.asked[asked:] if method == "GET" and "/resolve/" in path]
    assert download(hub, home, "some/larger", "--all")[0] == 0
    assert (folder / "model.bin").read_bytes() == b"the same again"


def test_ctrl_c_ends_it_at_once_and_the_next_goes_on_with_what_has_come(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    hub.bytes_per_second = 20 << 20
    process = start(hub, home, "some/larger")
    blobs = home / "hub" / "models--some--larger" / "blobs"

    def come() -> int:
        return sum(file.stat().st_size for file in blobs.glob("*.llmkit.incomplete"))

    wait_until(lambda: come() > 8 << 20, "some bytes", 30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (130, "")
    assert "goes on" in err
    assert "Traceback" not in err
    here = come()
    assert here > 8 << 20
    hub.bytes_per_second = None
    (partial,) = blobs.glob("*.llmkit.incomplete")
    # Only what is missing comes: with another beginning the whole has another checksum.
    with partial.open("r+b") as file:
        beginning = file.read(8)
        file.seek(0)
        file.write(b"mistaken")
    status, _, err = download(hub, home, "some/larger")
    assert (status, "another content" in err, partial.exists()) == (1, True, False)
    partial.write_bytes(beginning + (hub.models["some/larger"] / "model.safetensors").read_bytes()[8:here])
    status, out, _ = download(hub, home, "some/larger", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["downloaded_bytes"] <= SIZE + 2 - here
    assert (Path(told["path"]) / "model.safetensors").read_bytes() == (
        hub.models["some/larger"] / "model.safetensors"
    ).read_bytes()


def test_in_a_terminal_a_bar_shows_how_much_has_come(hub: FakeHub, tmp_path: Path, terminal: Any) -> None:
    hub.bytes_per_second = 20 << 20
    running = terminal({**os.environ, **hub.environment(tmp_path / "home")}, "download", "some/larger")
    running.read_until(" MB/s")
    running.read_until("40.0/40.0 MiB")
    assert running.end().rstrip().endswith(COMMIT)
    assert running.status == 0


@pytest.mark.parametrize(
    ("words", "environ", "code"),
    [
        (("nobody/nothing",), {}, "model_name_not_found"),
        (("no such name",), {}, "model_name_not_found"),
        (("some/demo", "--revision", "no-such-branch"), {}, "model_name_not_found"),
        (("some/gated",), {}, "model_gated"),
        (("some/demo",), {"HF_HUB_OFFLINE": "1"}, "not_ready"),
        (("some/demo",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "upstream_unreachable"),
    ],
)
def test_what_cannot_be_had_is_told_by_its_reason(
    hub: FakeHub, tmp_path: Path, words: tuple[str, ...], environ: dict[str, str], code: str
) -> None:
    hub.models["some/gated"] = demo_model_path()
    hub.gated.add("some/gated")
    status, out, err = download(hub, tmp_path / "home", *words, "--json", HF_TOKEN=TOKEN, **environ)
    assert (status, out) == (1, "")
    assert json.loads(err)["error"]["code"] == code
    assert TOKEN not in err
    assert "Traceback" not in download(hub, tmp_path / "home", *words, **environ)[2]


@pytest.mark.parametrize("name", ["some/demo", "some/larger"])  # a large file comes another way than a small one
def test_the_token_goes_to_the_hub(hub: FakeHub, tmp_path: Path, name: str) -> None:
    assert download(hub, tmp_path / "home", name, HF_TOKEN=TOKEN)[0] == 0
    asked = {(method, header) for method, path, header in hub.asked if path.endswith("/model.safetensors")}
    assert ("GET", f"Bearer {TOKEN}") in asked
    assert {header for _, header in asked} == {f"Bearer {TOKEN}"}
    before = len(hub.asked)
    assert download(hub, tmp_path / "other", name, HF_TOKEN=TOKEN, HF_HUB_DISABLE_IMPLICIT_TOKEN="1")[0] == 0
    assert {header for _, _, header in hub.asked[before:]} == {None}


def test_a_line_that_breaks_again_and_again_is_no_end_while_something_comes(hub: FakeHub, tmp_path: Path) -> None:
    hub.bytes_per_answer, hub.busy = 5 << 20, 2
    status, out, err = download(hub, tmp_path / "home", "some/larger")
    assert status == 0, err
    assert (Path(out.strip()) / "model.safetensors").stat().st_size == SIZE
    hub.bytes_per_answer = 0
    status, _, err = download(hub, tmp_path / "other", "some/larger")
    assert (status, "goes on with what is here" in err) == (1, True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends no process with a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_the_download(hub: FakeHub, tmp_path: Path, number: signal.Signals) -> None:
    hub.bytes_per_second = 4 << 20
    process = start(hub, tmp_path / "home", "some/larger")
    wait_until(lambda: list(tmp_path.glob("home/**/*.llmkit.incomplete")), "some bytes", 30)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the end of the download")


def test_a_model_without_weights_that_an_engine_loads_is_told(hub: FakeHub, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model-q4.gguf").write_bytes(b"weights")
    hub.models["some/gguf"] = other
    status, out, err = download(hub, tmp_path / "home", "some/gguf")
    assert (status, out) == (1, "")
    assert "no weights" in err
    assert "--all" in err
    status, out, _ = download(hub, tmp_path / "home", "some/gguf", "--all")
    assert (status, (Path(out.strip()) / "model-q4.gguf").read_bytes()) == (0, b"weights")


FULL = """
import json
from pathlib import Path
from typing import Any
from llmkit.cli.hub import make_plan
from llmkit.errors import DiskFull
try:
    make_plan("some/larger", None, free_bytes=lambda path: 1000)
except DiskFull as error:
    print(json.dumps(error.to_wire()["error"]))
"""


def test_a_disk_that_is_too_small_is_told_before_anything_comes(hub: FakeHub, tmp_path: Path) -> None:
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", FULL], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    told = json.loads(done.stdout)
    assert told["details"] == {"needed_bytes": SIZE + 2, "free_bytes": 1000}
    assert "40 MiB" in told["message"]
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]


def test_what_another_revision_has_takes_no_room(hub: FakeHub, tmp_path: Path) -> None:
    status, out, err = download(hub, tmp_path / "home", "some/larger")
    assert status == 0, err
    # As if it was another revision that came: the same weights, in the snapshot of another commit.
    Path(out.strip()).rename(Path(out.strip()).with_name("1" * 40))
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", FULL], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["details"]["needed_bytes"] == 2  # config.json: the fake hub names no blob of it
    status, out, _ = download(hub, tmp_path / "home", "some/larger", "--json")
    assert (status, json.loads(out)["downloaded_bytes"]) == (0, 2)


def test_without_the_library_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmkit.cli import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["download", "some/demo"]) == 1
    assert "-m pip install huggingface_hub" in capsys.readouterr().err
