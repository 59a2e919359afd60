"""What a double kill left: engines whose server and guardian are both gone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.process.guardian import RECORD, Process, boot_id, end_all, is_alive, marked, remove_run_dir

REAP_SECONDS = 10.0


@dataclass(frozen=True)
class Record:
    """What a guardian wrote about its engine."""

    engine_id: str
    boot_id: str
    guardian: Process | None
    engine: Process | None

    @classmethod
    def read(cls, run_dir: Path) -> Record | None:
        """Read the record in an engine's folder, or None if there is none that can be understood."""
        path = run_dir / RECORD
        try:
            if path.lstat().st_uid != os.getuid():
                return None  # somebody else's word about which processes to end
            fields = json.loads(path.read_text())
            return cls(
                engine_id=str(fields["engine_id"]),
                boot_id=str(fields["boot_id"]),
                guardian=_process(fields["guardian"]),
                engine=_process(fields["engine"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def kept(self) -> bool:
        """Whether its guardian lives, so that the engine is none of our business."""
        return self.boot_id == boot_id() and self.guardian is not None and is_alive(self.guardian)

    def processes(self) -> list[Process]:
        """Give what runs of the engine, and nothing that merely has the number of one of its processes."""
        if self.boot_id != boot_id():
            return []
        found = marked(self.engine_id)
        # Known by its start time, even if it wiped its environment.
        if self.engine is not None and self.engine not in found and is_alive(self.engine):
            found.append(self.engine)
        return found


def _process(value: Any) -> Process | None:
    if value is None:
        return None
    pid, start = value
    return Process(int(pid), int(start))


def reap_leftovers(server_dir: Path) -> list[Path]:
    """End the engines that a server which is gone has left without a guardian, and remove their folders. Blocks.

    Parameters
    ----------
    server_dir
        The folder of that server; the folders in it are those of its engines.

    Returns
    -------
    list[Path]
        The folder of every engine that was found without a guardian.
    """
    try:
        folders = sorted(entry for entry in server_dir.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []
    return [run_dir for run_dir in folders if reap(run_dir)]


def reap(run_dir: Path) -> bool:
    """End one engine that nobody keeps any more, and remove its folder. Blocks, 10 s at most.

    Returns
    -------
    bool
        Whether there was such an engine; False, and nothing done, if its guardian lives.
    """
    if not (run_dir / RECORD).exists():
        # The record comes before the first process of the engine, so there has been none.
        remove_run_dir(str(run_dir))
        return False
    record = Record.read(run_dir)
    if record is None or record.kept:
        return False
    if end_all(record.processes, grace=0, bound=REAP_SECONDS):
        remove_run_dir(str(run_dir))
    return True
