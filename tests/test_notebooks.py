"""Every example notebook, run against a real server with real vLLM, its answers compared with the stored ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support import REPOSITORY, JupyterServer

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SANITIZE = REPOSITORY / "tests" / "data" / "nbval.cfg"
CELL_SECONDS = 240
ROUND_SECONDS = 600

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def run(folder: Path, server: JupyterServer) -> str:
    """Run the notebooks of a folder with nbval, in kernels that know this server; give what pytest printed."""
    command = [
        *[sys.executable, "-m", "pytest", "--nbval", f"--nbval-sanitize-with={SANITIZE}"],
        *[f"--nbval-cell-timeout={CELL_SECONDS}", str(folder)],
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=server.client_environment(),
        capture_output=True,
        text=True,
        timeout=ROUND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.vllm
@pytest.mark.timeout(2 * ROUND_SECONDS)
def test_all_give_their_stored_answers_twice_in_one_server(tmp_path: Path) -> None:
    # A copy: some keep files beside themselves.
    folder = Path(
        shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    )
    cells = sum(c.cell_type == "code" for path in NOTEBOOKS for c in nbformat.read(path, as_version=4).cells)
    with JupyterServer("lab", standby="on") as server:
        for _ in range(2):
            assert f"{cells} passed" in run(folder, server)
            # One model stays for the next notebook, until it is idle for ten minutes.
            assert server.request("GET", "llm/loaded_models/").json() == ["atlas"]
            stored = [one["model_id"] for one in server.request("GET", "llm/configurations/").json()]
            assert sorted(stored) == ["atlas", "capitals"]
            assert server.request("GET", "llm/keys/").json() == {"keys": []}


@each_notebook
def test_every_cell_is_run_and_compared(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    assert [cell.source for cell in cells if cell.metadata.get("tags") or "NBVAL" in cell.source] == []


@each_notebook
def test_no_stored_output_needs_a_kernel_that_is_gone(notebook: Path) -> None:
    # A stored widget view would open as an error; its text says what to do.
    assert "application/vnd.jupyter.widget-view+json" not in notebook.read_text(encoding="utf-8")


@each_notebook
def test_no_address_key_or_id_of_a_server_is_stored(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    found = re.findall(r"https?://(?:localhost|127\.0\.0\.1)\S*|\btoken [0-9a-f]{16,}|\bsk-\w{8,}", text)
    assert found == []
