"""Binder: its files do what repo2docker makes of them, and the quickstart works on a machine as small as Binder's."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import nbformat
import pytest
from kernels import ServerKernel
from small_machine import SmallMachine
from support import REPOSITORY, JupyterServer

LIMIT_BYTES = 2_000_000_000
NOTEBOOK = "notebooks/quickstart.ipynb"


@pytest.mark.vllm
def test_the_quickstart_works_with_2_gb_and_one_core(tmp_path: Path) -> None:
    root = tmp_path / "home"
    shutil.copytree(REPOSITORY / "notebooks", root / "notebooks")
    cells = nbformat.read(REPOSITORY / NOTEBOOK, as_version=4).cells
    started = time.monotonic()
    steps = []
    with SmallMachine(LIMIT_BYTES) as machine:
        with JupyterServer("lab", root_dir=root, standby="auto", prefix=machine.prefix) as server:
            assert server.process is not None
            machine.watch(server.process.pid)
            steps.append(f"server {time.monotonic() - started:.1f} s")
            assert server.request("GET", f"lab/tree/{NOTEBOOK}").is_success
            devices = server.request("GET", "llm/devices").json()
            assert devices["cpu"]["cores"] == 1
            with ServerKernel(server.url, server.token) as kernel:
                for cell in cells:
                    if cell.cell_type == "code":
                        began = time.monotonic()
                        for kind, content in kernel.messages(cell.source):
                            assert kind != "error", (cell.source, content)
                        steps.append(f"{cell.source.splitlines()[-1][:20]} {time.monotonic() - began:.1f}")
        print(f"\n{machine.describe()}\n{time.monotonic() - started:.1f} s: {steps}\n{devices}")
