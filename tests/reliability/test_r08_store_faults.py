"""R8: any one write, fsync, open or truncation fails, or all from there on: the state is the old or the new one.

This file is the program that is harmed, too: ``python test_r08_store_faults.py FOLDER calls|size``. It is one of its
own, so that its faults reach no other test.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmkit.engines.openai import OpenAIEngineType
from llmkit.errors import LLMKitError
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.registry.secrets import SecretFiles
from llmkit.registry.store import Store
from llmkit.schemas import ModelConfigRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with the system calls of Linux")

SYSTEM_CALLS = {
    # name: result and arguments; a failed one gives -1 and sets errno
    b"open": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    b"write": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    b"pwrite": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64),
    b"pwrite64": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64),
    b"ftruncate": (ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    b"unlink": (ctypes.c_int, ctypes.c_char_p),
}
IOERR_FSYNC = 1034
FILE_METHODS = 19  # of sqlite3_io_methods in version 3, with the version before them
SYNC = 5


def sqlite_library() -> str | None:
    """Give the library that Python's SQLite is in, if it is one of its own."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next((line.split()[-1] for line in lines if "/libsqlite3.so" in line), None)


# -- the faults --------------------------------------------------------------------------------------------------


class Calls:
    """Lets the k-th call fail that could change a file, of SQLite's and of Python's.

    ``fsync`` is none of the system calls that SQLite lets us replace: it is caught one storey higher, in the methods
    of its files.
    """

    errors = (errno.ENOSPC, errno.EIO)

    class _VFS(ctypes.Structure):
        _fields_ = (
            ("version", ctypes.c_int),
            ("file_size", ctypes.c_int),
            ("longest_path", ctypes.c_int),
            ("next", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("data", ctypes.c_void_p),
            ("methods", ctypes.c_void_p * 13),
            ("set_system_call", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)),
            ("get_system_call", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)),
            ("next_system_call", ctypes.c_void_p),
        )

    def __init__(self, library: str) -> None:
        self.count = 0
        self._at = 0
        self._error = 0
        self._forever = False
        self._kept: list[Any] = []  # what C code refers to
        self._methods: dict[int, Any] = {}
        sqlite = ctypes.CDLL(library)
        sqlite.sqlite3_vfs_find.restype = ctypes.POINTER(self._VFS)
        real = sqlite.sqlite3_vfs_find(None)
        for name, kinds in SYSTEM_CALLS.items():
            self._replace_system_call(real, name, ctypes.CFUNCTYPE(*kinds, use_errno=True))
        self._watch_files(sqlite, real)
        os.open = self._of_python(os.open)
        os.fsync = self._of_python(os.fsync)

    def arm(self, at: int, error: int, *, forever: bool) -> None:
        self.count, self._at, self._error, self._forever = 0, at, error, forever

    def disarm(self) -> None:
        self._at = 0

    def _fails(self) -> bool:
        self.count += 1
        return bool(self._at) and (self.count >= self._at if self._forever else self.count == self._at)

    def _replace_system_call(self, vfs: Any, name: bytes, kind: Any) -> None:
        address = vfs.contents.get_system_call(ctypes.cast(vfs, ctypes.c_void_p), name)
        if not address:
            return
        original = kind(address)

        def call(*arguments: Any) -> int:
            if self._fails():
                ctypes.set_errno(self._error)
                return -1
            return int(original(*arguments))

        replacement = kind(call)
        self._kept.append(replacement)
        pointer = ctypes.cast(replacement, ctypes.c_void_p)
        assert vfs.contents.set_system_call(ctypes.cast(vfs, ctypes.c_void_p), name, pointer) == 0

    def _watch_files(self, sqlite: Any, real: Any) -> None:
        ours = self._VFS.from_buffer_copy(real.contents)
        ours.name = b"faulty"
        pointer = ctypes.c_void_p
        opening = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, ctypes.c_int, pointer)
        syncing = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int)
        original_open = opening(real.contents.methods[0])

        def sync_of(original: int) -> Any:
            real_sync = syncing(original)
            return syncing(lambda file, flags: IOERR_FSYNC if self._fails() else real_sync(file, flags))

        def open_file(_: int, name: int, file: int, flags: int, out: int) -> int:
            result = int(original_open(ctypes.cast(real, pointer), name, file, flags, out))
            methods = ctypes.cast(file, ctypes.POINTER(pointer))  # a file begins with the address of its methods
            if methods[0] and methods[0] not in self._methods:
                copied = (pointer * FILE_METHODS).from_buffer_copy((pointer * FILE_METHODS).from_address(methods[0]))
                replacement = sync_of(copied[SYNC])
                copied[SYNC] = ctypes.cast(replacement, pointer)
                self._kept.append(replacement)
                self._methods[methods[0]] = copied
            if methods[0]:
                methods[0] = ctypes.addressof(self._methods[methods[0]])
            return result

        replacement = opening(open_file)
        ours.methods[0] = ctypes.cast(replacement, pointer)
        self._kept += [replacement, ours]
        assert sqlite.sqlite3_vfs_register(ctypes.byref(ours), 1) == 0

    def _of_python(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self._fails():
                raise OSError(self._error, os.strerror(self._error))
            return original(*arguments, **more)

        return call


class Sizes:
    """Lets the kernel refuse files beyond a size, which grows with k: a real fault in every write."""

    errors = (errno.EFBIG,)
    step = 1500

    def __init__(self) -> None:
        import resource

        self._resource = resource
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.count = 60  # ends beyond what the largest file needs

    def arm(self, at: int, error: int, *, forever: bool) -> None:
        del error, forever
        if at:
            self._resource.setrlimit(self._resource.RLIMIT_FSIZE, (at * self.step, self._limits[1]))

    def disarm(self) -> None:
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, self._limits)


# -- the program -------------------------------------------------------------------------------------------------

State = dict[str, tuple[str, str]]
"""Description and key by ``model_id``."""


def request(model_id: str, text: str, key: str) -> ModelConfigRequest:
    kwargs: dict[str, Any] = {"api_key": key, "base_url": "http://127.0.0.1:9/v1"}
    return ModelConfigRequest(
        model_id=model_id, model_name="n", model_type="openai", model_kwargs=kwargs, description=text
    )


def read_back(folder: Path) -> State:
    store = Store(folder)
    assert store.problems == []
    files = SecretFiles(folder)
    state = {}
    for configuration in store.all():
        secret = files.read(configuration)
        assert secret is not None, f"the key of {configuration.model_id} is gone"
        assert configuration.model_kwargs["api_key"] == secret.mark()
        state[configuration.model_id] = (configuration.description or "", secret.value)
    assert store.problems == []
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()
    assert not list(folder.glob("*.corrupt-*")), "a healthy file was kept aside"
    return state


class Trial:
    """One run through all operations; what is confirmed is expected, what failed may be old or new."""

    def __init__(self, folder: Path, codes: Counter[str]) -> None:
        self.folder = folder
        self.codes = codes
        self.sure: State = read_back(folder)
        self.unsure: dict[str, list[tuple[str, str] | None]] = {}

    def registry(self) -> ModelRegistry:
        settings = Settings(state_dir=self.folder, run_dir=self.folder / "run")
        return ModelRegistry(
            settings, lambda event: None, logging.getLogger("test"), {}, {"openai": OpenAIEngineType()}
        )

    async def attempt(self, work: Any, model_id: str, new: tuple[str, str] | None) -> None:
        old = self.unsure.get(model_id, [self.sure.get(model_id)])
        try:
            await work
        except LLMKitError as error:
            self.codes[error.code] += 1
            self.unsure[model_id] = [*old, new]
        else:
            self.unsure.pop(model_id, None)
            self.sure.pop(model_id, None)
            if new is not None:
                self.sure[model_id] = new

    async def operations(self, registry: ModelRegistry) -> None:
        stored = registry._stored
        for model_id, text in (("new", "x" * 1500), ("newer", "y" * 1900), ("a", "z" * 1000), ("b", "")):
            known = {c.model_id: c.config_id for c in registry.configurations()}
            key = f"key-of-{model_id}"
            if not text:
                await self.attempt(registry.delete(known[model_id]), model_id, None)
            elif model_id in known:
                update = registry.update(known[model_id], request(model_id, text, key))
                await self.attempt(update, model_id, (text, key))
            else:
                await self.attempt(registry.configure(request(model_id, text, key)), model_id, (text, key))
            # Reads go on.
            self.compare({c.model_id: c.description or "" for c in await stored.read()})
        configuration = registry.configuration(next(c.config_id for c in registry.configurations()))
        for work in (
            stored.claim(configuration),
            stored.add_load(configuration.config_id, "hash", 0.0, 1.0, {"a": 1}),
            stored.last_load(configuration.config_id, "hash"),
            stored.release(configuration.config_id),
        ):
            try:
                await work
            except LLMKitError as error:
                self.codes[error.code] += 1

    def compare(self, found: dict[str, str]) -> None:
        for model_id in {*found, *self.sure, *self.unsure}:
            allowed = self.unsure.get(model_id, [self.sure.get(model_id)])
            assert found.get(model_id) in [state and state[0] for state in allowed], model_id

    async def run(self, faults: Calls | Sizes, at: int, error: int, *, forever: bool) -> bool:
        registry = self.registry()
        faults.arm(at, error, forever=forever)
        try:
            await registry.start()
            await self.operations(registry)
        except (LLMKitError, OSError):
            if registry.configurations():  # only the start may fail as a whole
                raise
            self.codes["did not start"] += 1
            return False
        finally:
            faults.disarm()
            # The same registry goes on once the fault is over.
            if registry.configurations():
                await self.attempt(
                    registry.configure(request("after", "t", "key-of-after")), "after", ("t", "key-of-after")
                )
                assert "after" in self.sure
            await registry.close()
        return True

    def check(self) -> None:
        state = read_back(self.folder)
        self.compare({model_id: text for model_id, (text, _) in state.items()})
        for model_id, (_, key) in state.items():
            assert key == f"key-of-{model_id}"
        left = [path.name for path in (self.folder / "secrets").iterdir() if path.suffix == ".new"]
        assert not left, "half a key was left"


async def make_baseline(folder: Path) -> None:
    trial = Trial(folder, Counter())
    registry = trial.registry()
    await registry.start()
    for model_id in "abc":
        await registry.configure(request(model_id, "first", f"key-of-{model_id}"))
    await registry.close()


def main(folder: Path, method: str) -> None:
    baseline, empty = folder / "baseline", folder / "empty"
    Store(empty).close()
    asyncio.run(make_baseline(baseline))
    library = sqlite_library()
    faults: Calls | Sizes
    if method == "calls":
        assert library
        faults = Calls(library)
    else:
        faults = Sizes()
    codes: Counter[str] = Counter()

    @contextmanager
    def trial() -> Iterator[Trial]:
        shutil.copytree(baseline, folder / "state")
        one = Trial(folder / "state", codes)
        yield one
        one.check()
        shutil.rmtree(folder / "state")

    with trial() as plain:  # without a fault: how many calls there are
        asyncio.run(plain.run(faults, 0, 0, forever=False))
    calls, runs = faults.count, 0
    assert not codes, codes
    for error in faults.errors:
        for forever in (False, True) if method == "calls" else (True,):
            for at in range(1, calls + 1):
                what = f"{method} {at} of {calls}, {errno.errorcode[error]}, {'for ever' if forever else 'once'}"
                try:
                    with trial() as harmed:
                        asyncio.run(harmed.run(faults, at, error, forever=forever))
                except BaseException as failure:
                    failure.add_note(what)
                    raise
                runs += 1
    print(json.dumps({"calls": calls, "runs": runs, "refused": codes}))


# -- the tests ---------------------------------------------------------------------------------------------------


def harm(folder: Path, method: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(folder), method],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["refused"].get("disk_full") or method == "size", "no fault reached the store"
    return told


@pytest.mark.skipif(sqlite_library() is None, reason="SQLite is part of Python here; its calls cannot be replaced")
def test_r08_any_call_may_fail(tmp_path: Path) -> None:
    told = harm(tmp_path, "calls")
    print(f"\nR8: {told['runs']} runs, each of {told['calls']} calls failed once and for ever: {told['refused']}")


def test_r08_no_file_may_grow_beyond_a_size(tmp_path: Path) -> None:
    told = harm(tmp_path, "size")
    assert told["refused"]
    print(f"\nR8: {told['runs']} limits of a file's size: {told['refused']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
