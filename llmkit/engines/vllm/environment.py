"""The environment of a vLLM engine: what it needs of the server's, and nothing else.

The server's environment holds keys of endpoints, tokens of Jupyter and whatever else an operator put there; an
engine, and what a model's files make it do, sees none of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"

_PASSED: Final = re.compile(
    r"""
    PATH | HOME | USER | LOGNAME | LANG | LANGUAGE | LC_\w+ | TZ | VIRTUAL_ENV | CONDA_PREFIX
    # caches, hubs and the way to them
    | XDG_(CACHE|CONFIG)_HOME | HF_\w+ | HUGGING_FACE_HUB_TOKEN | TRANSFORMERS_\w+ | TOKENIZERS_\w+
    | (https?|all|no)_proxy | (HTTPS?|ALL|NO)_PROXY | SSL_CERT_(FILE|DIR) | (REQUESTS|CURL)_CA_BUNDLE
    # where Python and the linker find things
    | PYTHON(PATH|HOME|NOUSERSITE|USERBASE|DONTWRITEBYTECODE|PYCACHEPREFIX|UTF8) | LD_LIBRARY_PATH | LD_PRELOAD
    # the engine and its libraries
    | VLLM_\w+ | (PY)?TORCH_\w+ | TORCHINDUCTOR_\w+ | TRITON_\w+ | FLASHINFER_\w+
    | (CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|HIP|ROCR|ROCM|HSA)_\w+
    | (OMP|GOMP|KMP|MKL|OPENBLAS|NUMEXPR|DNNL|ONEDNN|MALLOC)_\w+
    # what kernels are compiled with
    | CC | CXX | CPATH | C(PLUS)?_INCLUDE_PATH | LIBRARY_PATH
    """,
    re.VERBOSE,
)
_STOPPED: Final = re.compile(
    r"""
    # A key would lock us out; the folder of the socket is what guards it.
    VLLM_API_KEY
    # These open more routes, or load a file as code.
    | VLLM_SERVER_DEV_MODE | VLLM_ALLOW_INSECURE_SERIALIZATION | VLLM_ALLOW_RUNTIME_LORA_UPDATING
    | VLLM_LOGGING_CONFIG_PATH
    # These change the log, which the progress is read off.
    | VLLM_CONFIGURE_LOGGING | VLLM_LOGGING_(PREFIX|STREAM)
    # These belong to one engine, and the server may itself run inside another.
    | VLLM_PORT | VLLM_DP_\w+ | VLLM_USE_RUST_FRONTEND | VLLM_RUST_FRONTEND_PATH | VLLM_KEEP_ALIVE_ON_ENGINE_DEATH
    """,
    re.VERBOSE,
)


def engine_environ(
    environ: Mapping[str, str],
    run_dir: Path,
    *,
    gpus: Sequence[int] = (),
    offline: bool = False,
    sets_kv_cache: bool = False,
    processors: str | None = None,
) -> dict[str, str]:
    """Make the environment of one engine.

    Parameters
    ----------
    environ
        The server's environment.
    run_dir
        The engine's folder; its sockets and temporary files lie there and go with it.
    gpus
        The GPUs that it may use; none given, it is left to the server's environment.
    offline
        Nothing is downloaded.
    sets_kv_cache
        An argument says how large the KV cache is; it wins over the variable that says so too.
    processors
        Which processors each worker on the CPU gets, where the server's environment does not say.
    """
    given = {name: value for name, value in environ.items() if _allowed(name)}
    if gpus:
        given |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if sets_kv_cache:
        given.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if offline:
        given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if processors is not None:
        given = {"VLLM_CPU_OMP_THREADS_BIND": processors, **given}
    cache = Path(given.get("XDG_CACHE_HOME") or Path(given.get("HOME") or "~").expanduser() / ".cache")
    defaults = {
        # Its default is in TMPDIR, and would go with it.
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "vllm" / "torchinductor"),
        # vLLM gives up after 600 s, downloads included; our own watch is for signs of life.
        "VLLM_ENGINE_READY_TIMEOUT_S": str(7 * 86400),
    }
    fixed = {
        "TMPDIR": str(run_dir),
        "VLLM_RPC_BASE_PATH": str(run_dir),
        # Every listener of its processes stays on this machine, whatever its host name resolves to.
        "VLLM_HOST_IP": LOOPBACK,
        "VLLM_LOOPBACK_IP": LOOPBACK,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TP_SOCKET_IFNAME": "lo",
        # Longer than ours: who closes an idle connection first must not be the one that is written to.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_DISABLE_LOG_LOGO": "1",
        "PYTHONUNBUFFERED": "1",
        # The folder of the server is full of notebooks and modules; none of them is to be imported.
        "PYTHONSAFEPATH": "1",
        # Else a process that renames itself wipes its environment, and with it what it is found by.
        "SPT_NOENV": "1",
    }
    return defaults | given | fixed


def _allowed(name: str) -> bool:
    return bool(_PASSED.fullmatch(name)) and not _STOPPED.fullmatch(name)
