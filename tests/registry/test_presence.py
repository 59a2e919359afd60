from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.registry.presence import Presence, one_at_a_time

fcntl = pytest.importorskip("fcntl", reason="there are no such locks on Windows")

PROGRAM = """
import sys, time
from pathlib import Path
from llmkit.registry.presence import Presence
presence = Presence(Path(sys.argv[1]))
print(presence.server_id, flush=True)
time.sleep(600)
"""


def test_a_server_is_alive_until_it_closes(tmp_path: Path) -> None:
    ours, theirs = Presence(tmp_path), Presence(tmp_path)
    assert ours.server_id != theirs.server_id
    assert ours.alive(ours.server_id)
    assert ours.alive(theirs.server_id)
    theirs.close()
    theirs.close()
    assert not ours.alive(theirs.server_id)
    assert not ours.alive("never-was")
    ours.close()
    assert list((tmp_path / "servers").iterdir()) == []


def test_a_killed_server_is_not_alive_and_its_lock_is_removed(tmp_path: Path) -> None:
    ours = Presence(tmp_path)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        server_id = process.stdout.readline().strip()
        assert ours.alive(server_id)
        process.send_signal(signal.SIGSTOP)  # it does nothing, but it is there
        assert ours.alive(server_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "servers" / f"{server_id}.lock").exists()
    assert not ours.alive(server_id)
    assert not (tmp_path / "servers" / f"{server_id}.lock").exists()
    ours.close()


def test_a_start_removes_what_the_dead_have_left_and_nothing_else(tmp_path: Path) -> None:
    theirs = Presence(tmp_path)
    dead = tmp_path / "servers" / "dead.lock"
    dead.touch()
    ours = Presence(tmp_path)
    assert not dead.exists()
    assert ours.alive(theirs.server_id)
    ours.close()
    theirs.close()


def test_a_pid_that_is_used_again_brings_no_server_back(tmp_path: Path) -> None:
    """Nothing of a presence is a pid: this process lives, the server that it was is gone."""
    first = Presence(tmp_path)
    lock = tmp_path / "servers" / f"{first.server_id}.lock"
    assert first._lock is not None
    os.close(first._lock)  # as the kernel does at its end
    first._lock = None
    lock.write_text(str(os.getpid()))
    second = Presence(tmp_path)
    assert not second.alive(first.server_id)
    second.close()


def test_a_child_does_not_keep_the_lock_of_a_dead_server(tmp_path: Path) -> None:
    ours, theirs = Presence(tmp_path), Presence(tmp_path)
    with subprocess.Popen(["sleep", "600"], close_fds=False) as child:
        theirs.close()
        assert not ours.alive(theirs.server_id)
        child.kill()
    ours.close()


def test_the_files_are_for_their_user_alone(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    (lock,) = (tmp_path / "servers").iterdir()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    assert stat.S_IMODE(lock.parent.stat().st_mode) == 0o700
    presence.close()


def test_a_file_system_without_locks_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    ours, theirs = Presence(tmp_path), Presence(tmp_path)
    assert not ours.alive(theirs.server_id)
    with one_at_a_time(tmp_path / "lock", 0.1):
        pass
    ours.close()
    theirs.close()


def test_one_at_a_time_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "lock", 1.0), pytest.raises(TimeoutError), one_at_a_time(tmp_path / "lock", 0.05):
        pass
    with one_at_a_time(tmp_path / "lock", 0.05):
        pass
