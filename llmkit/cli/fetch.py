"""Bring the files of a model into the hub's cache: ``python -m llmkit.cli.fetch``, a process of its own.

The hub's library begins a file anew when the process that was downloading it has ended. Weights are too large for that:
they are brought here piece by piece to a file that stays, checked, and put where the library looks for them; the
library does the rest. That is one process, which can be ended at any moment.

Standard input: a line with a JSON array of name, revision and names of files; when it ends, whoever wanted them is
gone, and so is this process. Standard output: the folder of the model.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import IO, Final, TypeVar

import httpx

if sys.platform != "win32":
    import fcntl

PARTIAL: Final = ".llmkit.incomplete"
LEAST_BYTES: Final = 8 << 20
"""Smaller files are left to the library."""
FILES_AT_ONCE: Final = 4
SILENCE_SECONDS: Final = 30.0
TRIES: Final = 5
"""So often in a row is a step tried that brings nothing."""
_PIECE: Final = 1 << 20
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def main() -> None:
    """Bring what standard input names, and print where it lies."""
    from huggingface_hub import constants, snapshot_download

    name, revision, files = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(lambda file: _bring(name, revision, file, blobs), files))
    patterns = [glob.escape(file) for file in files]
    print(_persist(lambda: snapshot_download(name, revision=revision, allow_patterns=patterns)), flush=True)


def _end_with_parent() -> None:
    # The pipe ends with the process that holds its other side, however that one is ended.
    sys.stdin.read()
    os._exit(1)


def _persist(step: Callable[[], _T], progress: Callable[[], int] = lambda: 0) -> _T:
    """Do something again after a failure that may pass, so long as there is progress, else some times."""
    left, before = TRIES, progress()
    while True:
        try:
            return step()
        except Exception as error:  # the library may bring another httpx than ours
            here = progress()
            left, before = (TRIES if here > before else left) - 1, here
            if not left or not _may_pass(error):
                raise
            time.sleep(TRIES - left)


def _may_pass(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in (
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
    )


def _bring(name: str, revision: str, file: str, blobs: Path) -> None:
    """Bring a large file to where the library looks for it; do nothing for one that is small or here."""
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url

    url = hf_hub_url(name, file, revision=revision)
    metadata = _persist(lambda: get_hf_file_metadata(url))
    if not metadata.etag or not metadata.size or metadata.size < LEAST_BYTES:
        return
    blob = blobs / metadata.etag
    if blob.exists():
        return
    blobs.mkdir(parents=True, exist_ok=True)
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})}
    partial = blobs / f"{metadata.etag}{PARTIAL}"
    with partial.open("ab") as out:
        if not _lock(out):
            return  # somebody else brings it; the library has a file of its own
        size = metadata.size
        _persist(lambda: _go_on(url, headers, out, size), lambda: partial.stat().st_size)
        out.flush()
        if not _is_whole(partial, metadata.etag, size):
            partial.unlink()
            raise ValueError(f"{file} came with another content than the hub said; it was removed.")
        partial.replace(blob)


def _go_on(url: str, headers: dict[str, str], out: IO[bytes], size: int) -> None:
    """Add what is missing to a file."""
    out.seek(0, os.SEEK_END)
    if out.tell() > size:
        out.truncate(0)
    start = out.seek(0, os.SEEK_END)
    if start == size:
        return
    ranged = {**headers, "Range": f"bytes={start}-"} if start else headers
    # Where the hub sends us on to another host, the token stays behind.
    with httpx.stream("GET", url, headers=ranged, follow_redirects=True, timeout=SILENCE_SECONDS) as response:
        response.raise_for_status()
        if start and response.status_code != httpx.codes.PARTIAL_CONTENT:
            out.truncate(0)
        for piece in response.iter_raw(_PIECE):
            out.write(piece)
            out.flush()


def _is_whole(file: Path, etag: str, size: int) -> bool:
    """Say whether a file is what the hub said; large files are named for their SHA-256."""
    if file.stat().st_size != size:
        return False
    with file.open("rb") as content:
        return not _SHA256.fullmatch(etag) or hashlib.file_digest(content, "sha256").hexdigest() == etag


def _lock(file: IO[bytes]) -> bool:
    if sys.platform == "win32":
        return True  # what two have mixed up has another checksum
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
