"""R7: what was confirmed survives a SIGKILL at any moment, with two writers; nothing is there by half.

This file is the writers' program, too: ``python test_r07_store_kills.py`` forks one for each line that it reads,
so that no kill waits for the imports of the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import scaled

from llmkit.engines.openai import OpenAIEngineType
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.registry.secrets import SecretFiles
from llmkit.registry.store import Store
from llmkit.schemas import ModelConfigRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the end of a grandchild is read from /proc")

WRITERS = 2
KILLS = scaled(100)
LIFETIME_SECONDS = 0.25
AGE_OF_A_FOLDER = 10
"""So many cycles share a folder; the first of them is killed while it makes the database."""


# -- the writers -------------------------------------------------------------------------------------------------


def key_of(model_id: str, text: str) -> str:
    """Give a key that changes with every third change of the rest."""
    return f"key-of-{model_id}-{int(text.split()[0]) // 3}"


def request(model_id: str, text: str) -> ModelConfigRequest:
    return ModelConfigRequest(
        model_id=model_id,
        model_name="n",
        model_type="openai",
        model_kwargs={"api_key": key_of(model_id, text), "base_url": "http://127.0.0.1:9/v1"},
        description=text,
    )


async def write(state: Path, journal: Path, prefix: str) -> None:
    """Configure, change and delete until the forker ends; the journal says what is begun and what is done."""
    parent = os.getppid()
    file = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: str) -> None:
        os.write(file, (json.dumps(words) + "\n").encode())

    registry = ModelRegistry(
        Settings(state_dir=state, run_dir=state / "run"),
        lambda event: None,
        logging.getLogger("test"),
        {},
        {"openai": OpenAIEngineType()},
    )
    await registry.start()
    note("open")
    rng = random.Random()
    mine = {c.model_id: c.config_id for c in registry.configurations() if c.model_id.startswith(prefix)}
    number = 0
    while os.getppid() == parent:
        number += 1
        text = f"{number} " + "x" * rng.randrange(1900)
        choice = rng.random() if len(mine) > 3 else 0.0
        model_id = rng.choice(sorted(mine)) if choice > 0.4 else f"{prefix}{os.getpid()}-{number}"
        what = "" if choice > 0.85 else text
        note("begin", model_id, what)
        if choice <= 0.4:
            mine[model_id] = (await registry.configure(request(model_id, text))).config_id
        elif what:
            await registry.update(mine[model_id], request(model_id, text))
        else:
            await registry.delete(mine.pop(model_id))
        note("done", model_id, what)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        state, journal, prefix = json.loads(line)
        child = os.fork()
        if not child:
            asyncio.run(write(Path(state), Path(journal), prefix))
            return
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


# -- the test ----------------------------------------------------------------------------------------------------


class Forker:
    """Starts writers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, state: Path, journal: Path, prefix: str) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([str(state), str(journal), prefix]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def forker() -> Iterator[Forker]:
    starts = Forker()
    with starts.process:
        yield starts


def follow(journal: Path, confirmed: dict[str, str], pending: dict[str, tuple[str, str]], prefix: str) -> int:
    """Take up what a writer has noted; give how much it confirmed."""
    count = 0
    for line in journal.read_text().splitlines() if journal.exists() else []:
        word, *rest = json.loads(line)
        if word == "begin":
            pending[prefix] = (rest[0], rest[1])
        elif word == "done":
            count += 1
            del pending[prefix]
            model_id, text = rest
            confirmed.pop(model_id, None)
            if text:
                confirmed[model_id] = text
    return count


def check(state: Path, confirmed: dict[str, str], pending: dict[str, tuple[str, str]]) -> None:
    """Everything confirmed is there, nothing else but what was begun, and each with its key."""
    store = Store(state)
    assert store.problems == []
    stored = {c.model_id: c for c in store.all()}
    assert store.problems == []
    found: dict[str, Any] = {model_id: c.description for model_id, c in stored.items()}
    for model_id, text in pending.values():
        # The old or the new; what it turned out to be holds from now on.
        assert found.get(model_id) in (confirmed.get(model_id), text or None)
        confirmed.pop(model_id, None)
        if model_id in found:
            confirmed[model_id] = found[model_id]
    assert found == confirmed
    files = SecretFiles(state)
    for model_id, configuration in stored.items():
        secret = files.read(configuration)
        assert secret is not None
        assert secret.value == key_of(model_id, configuration.description or "")
        assert configuration.model_kwargs["api_key"] == secret.mark()
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()
    assert not list(state.glob("*.corrupt-*"))


def test_r07_what_was_confirmed_survives_sigkill(tmp_path: Path) -> None:
    kills = acknowledged = unopened = 0
    rng = random.Random()
    state, confirmed = tmp_path, {}
    with forker() as starts:
        for cycle in range(KILLS // WRITERS):
            if cycle % AGE_OF_A_FOLDER == 0:
                state, confirmed = tmp_path / f"state{cycle}", {}
            journals = {f"w{n}-": tmp_path / f"journal{cycle}-{n}" for n in range(WRITERS)}
            writers = {prefix: starts.start(state, journal, prefix) for prefix, journal in journals.items()}
            # The first in a folder is killed at a moment of its opening, the others later.
            longest = 0.06 if cycle % AGE_OF_A_FOLDER == 0 else LIFETIME_SECONDS
            for process in writers.values():
                time.sleep(rng.uniform(0, longest))
                os.kill(process, signal.SIGKILL)
                kills += 1
            wait_for_the_end(writers.values())
            pending: dict[str, tuple[str, str]] = {}
            for prefix, journal in journals.items():
                acknowledged += follow(journal, confirmed, pending, prefix)
                unopened += not journal.exists() or not journal.read_text()
            check(state, confirmed, pending)
    assert acknowledged > KILLS
    print(
        f"\nR7: {kills} SIGKILLs of {WRITERS} writers, {unopened} before the store was open: "
        f"{acknowledged} writes confirmed, 0 lost"
    )


def wait_for_the_end(processes: Any) -> None:
    for process in processes:
        while Path(f"/proc/{process}").exists():
            time.sleep(0.001)


if __name__ == "__main__":
    main()
