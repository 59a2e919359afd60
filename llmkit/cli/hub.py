"""Bring a model from the hub here: what it takes, whether there is room, and how far it is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from llmkit.cli.fetch import PARTIAL
from llmkit.cli.output import note
from llmkit.client.results import describe_bytes
from llmkit.errors import (
    DiskFull,
    LLMKitError,
    ModelGated,
    ModelNameNotFound,
    NotReady,
    NotSupported,
    UpstreamUnreachable,
)

ASK_SECONDS: Final = 10.0
MARGIN_BYTES: Final = 64 << 20
POLL_SECONDS: Final = 0.2
LINE_SECONDS: Final = 10.0
_ALWAYS: Final = (".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")
_WEIGHTS: Final = (".safetensors", ".bin", ".pt")
# In a process of its own, which can be ended at once; not with the modules of the folder that somebody is in.
_PROGRAM: Final = (sys.executable, "-P", "-m", "llmkit.cli.fetch")


@dataclass(frozen=True)
class Plan:
    """What a download takes.

    Attributes
    ----------
    name, revision
        Of the model.
    files
        Names of the files that belong to it.
    bytes
        That are missing here.
    folder
        Where the files come to lie.
    """

    name: str
    revision: str
    files: list[str]
    bytes: int
    folder: Path


def make_plan(
    name: str, revision: str | None, *, everything: bool = False, free_bytes: Callable[[Path], int] | None = None
) -> Plan:
    """Ask the hub what a model consists of, and see what of it is missing and whether it has room.

    Parameters
    ----------
    name, revision
        In the hub; the revision is a branch, tag or commit, ``main`` if it is not given.
    everything
        Every file of the repository, not only what an engine loads.
    free_bytes
        Measures the room of the disk of a folder; the real one if not given.

    Raises
    ------
    LLMKitError
        If the hub cannot be asked, has no such model, or the disk has no room for it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        raise NotReady(
            "HF_HUB_OFFLINE is set, so the hub is not asked.", hint="Unset it to download: env -u HF_HUB_OFFLINE ..."
        )
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
    except GatedRepoError:
        raise _gated(name) from None
    except RevisionNotFoundError:
        raise ModelNameNotFound(f"`{name}` has no revision `{revision}`.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelNameNotFound(
            f"The hub has no model `{name}`, or it is private.",
            hint=f"Look for it at {constants.ENDPOINT}/models; for a private one set HF_TOKEN.",
        ) from None
    except Exception as error:  # noqa: BLE001  # its HTTP library has errors of its own
        raise UpstreamUnreachable(
            f"The hub {constants.ENDPOINT} cannot be asked: {type(error).__name__}.",
            hint="Is this machine offline? HF_ENDPOINT names another hub, HTTPS_PROXY a proxy.",
        ) from None
    files = list(info.siblings or ()) if everything else wanted(info.siblings or ())
    if not everything and not any(file.rfilename.endswith(_WEIGHTS) for file in files):
        raise NotSupported(
            f"`{name}` has no weights that vLLM loads from a repository: {', '.join(_WEIGHTS)}.",
            hint="--all downloads every file of it, as those of other formats.",
        )
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / str(info.sha)
    missing = sum(_missing(file, repository / "blobs") for file in files if not (snapshot / file.rfilename).exists())
    room = free_bytes or (lambda path: shutil.disk_usage(path).free)
    free = room(next(path for path in (repository, *repository.parents) if path.exists()))
    if missing and free < missing + MARGIN_BYTES:
        raise DiskFull(
            f"`{name}` needs {describe_bytes(missing)}, and {repository.parent} has {describe_bytes(free)} free.",
            hint="Make room, or set HF_HOME to a folder of a larger disk.",
            details={"needed_bytes": missing, "free_bytes": free},
        )
    return Plan(name, revision or constants.DEFAULT_REVISION, [file.rfilename for file in files], missing, repository)


def _missing(file: Any, blobs: Path) -> int:
    """Give how many bytes of a file are not here: another revision may have it, or an interrupted download a part."""
    blob = file.lfs.sha256 if file.lfs else file.blob_id
    if blob and (blobs / blob).exists():
        return 0
    return max(0, (file.size or 0) - _size(blobs / f"{blob}{PARTIAL}"))


def wanted(files: Iterable[Any]) -> list[Any]:
    """Choose what vLLM loads: everything small, and the weights in the first format that there is."""
    listed = [file for file in files if "/" not in file.rfilename and not file.rfilename.startswith("consolidated")]
    formats = (ending for ending in _WEIGHTS if any(file.rfilename.endswith(ending) for file in listed))
    weights = next(formats, ".safetensors")
    return [file for file in listed if file.rfilename.endswith((*_ALWAYS, weights))]


def fetch(plan: Plan, *, quiet: bool) -> str:
    """Download what is missing, and give the folder of the model; being interrupted keeps what has come.

    Parameters
    ----------
    plan
        Of `make_plan`.
    quiet
        Show nothing.

    Raises
    ------
    LLMKitError
        If the download fails; asking again goes on with it.
    """
    before = _present(plan.folder)
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter; no shell
            _PROGRAM,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=words,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        try:
            _give(process.stdin, [plan.name, plan.revision, plan.files])
            with _shown(plan, quiet=quiet) as show:
                while process.poll() is None:
                    show(max(0, _present(plan.folder) - before))
                    time.sleep(POLL_SECONDS)
                if process.returncode == 0:
                    show(plan.bytes)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                if process.stdin is not None:
                    process.stdin.close()
        if process.returncode == 0:
            said.seek(0)
            return said.read().strip()
        words.seek(0)
        raise _failure(plan, words.read())


def _gated(name: str) -> ModelGated:
    from huggingface_hub import constants

    return ModelGated(
        f"The owner of `{name}` decides who may download it.",
        hint=f"Ask for access at {constants.ENDPOINT}/{name}, then set HF_TOKEN to a token of yours.",
    )


def _give(stdin: IO[str] | None, value: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
        if stdin is not None:
            # It stays open: when it ends, whatever has ended this process, the other one ends, too.
            stdin.write(f"{json.dumps(value)}\n")
            stdin.flush()


def _failure(plan: Plan, words: str) -> LLMKitError:
    last = next((line for line in reversed(words.splitlines()) if line.strip()), "no reason given")
    if "No space left" in words:
        return DiskFull(f"The disk of {plan.folder} is full.", hint="Make room and run it again: it goes on.")
    if "GatedRepoError" in words:
        return _gated(plan.name)
    error = UpstreamUnreachable(
        f"`{plan.name}` was not downloaded: {last.strip()}", hint="Run it again: it goes on with what is here."
    )
    error.details["log_tail"] = words.splitlines()[-20:]
    return error


def _present(folder: Path) -> int:
    return sum(_size(file) for file in (folder / "blobs").glob("*"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # renamed meanwhile


@contextlib.contextmanager
def _shown(plan: Plan, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    if quiet or not plan.bytes:
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich.console import Console  # slow to import
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=plan.bytes)
            yield lambda done: progress.update(task, completed=min(done, plan.bytes))
    else:
        yield _lines(plan)


def _lines(plan: Plan) -> Callable[[int], None]:
    next_at = time.monotonic() + LINE_SECONDS

    def show(done: int) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + LINE_SECONDS
            note(f"{describe_bytes(done)} of {describe_bytes(plan.bytes)}")

    return show
