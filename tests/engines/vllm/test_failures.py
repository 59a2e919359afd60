"""Why vLLM did not start: most of the logs are those of vLLM 0.32 that was given each of these faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmkit.engines.vllm.failures import LOG_TAIL_LINES, explain
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

DATA = Path(__file__).parent / "data"


def real_log(name: str) -> list[str]:
    return re.split(r"[\r\n]+", (DATA / f"{name}.log").read_text().strip())


@pytest.mark.parametrize(
    ("log", "model_name", "kind", "words", "param"),
    [
        ("name_offline", "nobody/nothing", ModelNameNotFound, "the server works offline", "model_name"),
        ("name_not_in_hub", "nobody/nothing", ModelNameNotFound, "hub has none of this name", "model_name"),
        ("name_hub_unreachable", "nobody/nothing", ModelNameNotFound, "hub cannot be reached", "model_name"),
        ("bad_path", "/nonexistent/model", ModelNameNotFound, "no model at /nonexistent/model", "model_name"),
        ("gated", "nobody/gated", ModelGated, "`nobody/gated` is gated", "model_name"),
        ("unknown_architecture", "some/model", UnknownArchitecture, "FooForCausalLM", "model_name"),
        ("unknown_model_type", "some/model", UnknownArchitecture, "'foozle'", "model_name"),
        ("no_weights", "some/model", LoadFailed, "no weights", "model_name"),
        (
            "kv_cache_too_small",
            "some/model",
            KVCacheTooSmall,
            "no room for 512 tokens.*384 fit",
            "model_kwargs.max_model_len",
        ),
        ("longer_than_model", "some/model", DoesNotFit, "100000.*takes 512 tokens", "model_kwargs.max_model_len"),
        ("out_of_memory", "some/model", OutOfMemory, "not enough memory.*372.53 GiB", "model_kwargs"),
        ("bad_argument", "some/model", EngineArgumentRefused, "--dtype: invalid choice: 'foo'", "model_kwargs"),
        ("bad_parser", "some/model", EngineArgumentRefused, "Reasoning parser 'foo' not found", "model_kwargs"),
        ("bad_quantization", "some/model", LoadFailed, "Cannot find the config file for awq$", None),
    ],
)
def test_the_log_of_a_failed_start_is_explained(
    log: str, model_name: str, kind: type[LLMKitError], words: str, param: str | None
) -> None:
    lines = real_log(log)
    error = explain(lines, model_name, 1)
    assert type(error) is kind
    assert re.search(words, error.message)
    assert error.param == param
    assert error.hint
    assert "\n" not in error.message
    assert error.details["log_tail"] == [line.rstrip()[:1000] for line in lines[-LOG_TAIL_LINES:]]


@pytest.mark.parametrize(("log", "fits"), [("kv_cache_too_small", 384), ("longer_than_model", 512)])
def test_a_context_that_is_too_long_comes_with_the_one_that_fits(log: str, fits: int) -> None:
    assert explain(real_log(log), "some/model", 1).details["fix"] == {"model_kwargs": {"max_model_len": fits}}


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.", OutOfMemory, "not enough memory"),
        (
            "ValueError: Free memory on device cuda:0 (1.0/80.0 GiB) on startup is less",
            OutOfMemory,
            "not enough memory",
        ),
        (
            "llmkit: not enough disk: 16106127360 bytes to download, 1073741824 bytes free in /cache",
            DiskFull,
            "15.0 GiB, and 1.0 GiB are free at /cache",
        ),
        ("llmkit: GatedRepoError: nobody/gated", ModelGated, "gated"),
        ("llmkit: RepositoryNotFoundError: nobody/x", ModelNameNotFound, "no model"),
        ("OSError: [Errno 28] No space left on device", DiskFull, "disk"),
        ("RuntimeError: Failed to infer device type, please set", LoadFailed, "no device"),
        ("World size (8) is larger than the number of available GPUs (1) in this node", DoesNotFit, "8 GPUs"),
        ("RevisionNotFoundError: 404", DoesNotFit, "no such revision"),
        ("ValueError: No available memory for the cache blocks. Try increasing", OutOfMemory, "once the weights"),
        ("RuntimeError: unable to write to file </torch_1_2>: No space left on device (28)", DiskFull, "/dev/shm"),
        (
            "Error while creating shared memory segment /dev/shm/nccl-abc (size 9), error: No space left on device",
            DiskFull,
            "/dev/shm",
        ),
        ("mymodule.StrangeError: something new", LoadFailed, "something new"),
    ],
)
def test_other_reasons_are_explained(line: str, kind: type[LLMKitError], words: str) -> None:
    prefixed = f"(EngineCore pid=7) ERROR 11-23 18:13:03 [core.py:1510] {line}"
    for lines in ([line], [prefixed, "RuntimeError: Engine core initialization failed. See root cause above."]):
        error = explain(lines, "some/model", 1)
        assert type(error) is kind
        assert words in error.message


def test_a_core_that_the_system_killed_is_told_as_too_little_memory() -> None:
    lines = ["RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}"]
    assert isinstance(explain(lines, "some/model", 1), OutOfMemory)
    ended = explain([lines[0].replace("-9", "1")], "some/model", 1)
    assert type(ended) is LoadFailed


@pytest.mark.parametrize(
    "harmless",
    [
        "WARNING 11-24 02:00:00 [x.py:1] Cannot reach https://huggingface.co/x: offline mode is enabled.",
        "(EngineCore pid=7) WARNING 11-24 02:00:00 [x.py:1] no compile cache: No space left on device",
        "ERROR 11-24 02:00:00 [r.py:45] Error retrieving file list: We couldn't connect to 'h', retrying 1 of 2",
        "/x/file_download.py:12: UserWarning: RepositoryNotFoundError while looking for an update",
    ],
)
def test_what_a_load_went_on_after_is_not_why_it_failed(harmless: str) -> None:
    error = explain([harmless, "ValueError: the weights are made of cheese"], "some/model", 1)
    assert "made of cheese" in error.message


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(-9, "ended by signal 9"), (3, "with exit status 3"), (None, "ended before it was ready")],
)
def test_a_log_that_says_nothing_still_gives_an_error(returncode: int | None, words: str) -> None:
    for lines in ([], ["Loading ..."]):
        error = explain(lines, "some/model", returncode)
        assert isinstance(error, LoadFailed)
        assert words in error.message


def test_an_endless_log_is_explained_quickly() -> None:
    lines = [f"{'x' * 900} {i} KV cache is needed, max seq len (" for i in range(5000)]
    details: dict[str, Any] = explain(lines, "some/model", 1).details
    assert len(details["log_tail"]) == LOG_TAIL_LINES
