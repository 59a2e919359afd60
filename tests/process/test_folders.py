from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import NotReady
from llmkit.process.folders import ServerFolder

MAKE_AND_DIE = """
import os, sys
from pathlib import Path
from llmkit.process.folders import ServerFolder
folder = ServerFolder(Path(sys.argv[1]))
(folder.path / "model.log").write_text("words")
print(folder.path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    mine = ServerFolder(tmp_path / "run")
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(mine.path.parent.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NotReady, match="another user"):
        ServerFolder(tmp_path / "link")
    mine.remove()
    assert not mine.path.exists()


def test_the_folder_of_a_living_server_is_left_alone(tmp_path: Path) -> None:
    mine, other = ServerFolder(tmp_path), ServerFolder(tmp_path)
    assert mine.remove_abandoned() == []
    assert other.path.exists()
    other.remove()
    mine.remove()


@pytest.mark.skipif(sys.platform != "linux", reason="engines are kept, and left, on Linux only")
def test_the_folder_of_a_killed_server_goes_at_the_next_start(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", MAKE_AND_DIE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -9
    assert left.exists()
    mine = ServerFolder(tmp_path)
    assert mine.remove_abandoned() == []  # no engine was left
    assert not left.exists()
    mine.remove()
