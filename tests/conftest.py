"""Fixtures of all tests: folders of their own, one real server and one real engine for a whole session."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings
from support import FOREIGN_VARIABLES, IN_CI, MARKERS, JupyterServer, missing
from traitlets.config import Config

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

pytest_plugins = ["pytest_jupyter.jupyter_server"]

# Hypothesis would fail what takes more than 200 ms once: that is how busy the machine is, and not what is tested.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

# In a process of pytest-xdist the main module has no `__spec__`, and multiprocessing asks for it to start another.
vars(sys.modules["__main__"]).setdefault("__spec__", None)


class LoadedModel(NamedTuple):
    """A model that is loaded for the whole session: prompt it, but do not unload it."""

    model_id: str
    config_id: str


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; on a continuous-integration machine that is a failure, but for GPU and Ray."""
    for marker in MARKERS:
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            if IN_CI and marker not in ("gpu", "ray"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested."""
    for marker in MARKERS:
        reason = missing(marker)
        skipped = terminalreporter.stats.get("skipped", []) if reason else []
        if count := sum(str(reason) in str(report.longrepr) for report in skipped):
            terminalreporter.section(f"NOT TESTED: {count} tests marked {marker}", red=True, bold=True)
            terminalreporter.line(str(reason))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep every test, also one with a server in its own process, away from the developer's state."""
    for name in os.environ:
        if name.startswith(FOREIGN_VARIABLES) and name != "XDG_CACHE_HOME":
            monkeypatch.delenv(name)
    # Short, because unix sockets lie in it.
    run_dir = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp" if os.name == "posix" else None))
    monkeypatch.setenv("LLMKIT_RUN_DIR", str(run_dir))
    monkeypatch.setenv("LLMKIT_STATE_DIR", str(tmp_path / "state"))
    yield
    shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[JupyterServer]:
    """Give one real JupyterLab with the extension, for every test that changes nothing for others."""
    with JupyterServer("lab") as running:
        yield running


@pytest.fixture(scope="session")
def loaded_model(server: JupyterServer) -> LoadedModel:
    """Load the demo model into real vLLM, once; for tests that only need a loaded model."""
    config_id = server.configure("demo")
    server.load(config_id)
    return LoadedModel("demo", config_id)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    """Give the shell that `get_ipython()` is, in a folder of its own; it is gone after the tests of a module."""
    from IPython.core.interactiveshell import InteractiveShell

    options = Config({"HistoryManager": {"enabled": False}})
    main = sys.modules["__main__"]
    made = InteractiveShell.instance(ipython_dir=str(tmp_path_factory.mktemp("ipython")), config=options)
    yield made
    made.extension_manager.unload_extension("llmkit")
    made.atexit_operations()
    atexit.unregister(made.atexit_operations)
    InteractiveShell.clear_instance()
    sys.modules["__main__"] = main  # the shell has put its own there
