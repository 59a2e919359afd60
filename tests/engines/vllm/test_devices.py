"""A model is spread over the devices that there are, or refused before anything is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.engines.vllm import devices
from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.engines.vllm.devices import device_count, processors, processors_of, too_few_devices
from llmkit.engines.vllm.environment import engine_environ
from llmkit.errors import NoRoom

BIND = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "processors", lambda: [0, 2, 4, 6])


def spread(tensor: int = 1, pipeline: int = 1, data: int = 1) -> VLLMArguments:
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "data_parallel_size": data}
    return VLLMArguments.model_validate({name: size for name, size in sizes.items() if size > 1})


def test_sizes_multiply() -> None:
    assert device_count(VLLMArguments()) == 1
    assert device_count(spread(2, 3, 4)) == 24


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        (spread(), None),
        (spread(tensor=2), "0,2|4,6"),
        (spread(data=3), "0|2|4"),
        (spread(2, 2), "0|2|4|6"),
        (spread(tensor=5), None),
    ],
)
@pytest.mark.usefixtures("four")
def test_processors_are_shared_out_evenly(arguments: VLLMArguments, shares: str | None) -> None:
    assert processors_of(arguments) == shares


@pytest.mark.usefixtures("four")
def test_more_devices_than_processors_are_refused_in_words() -> None:
    error = too_few_devices(spread(tensor=4, data=2), {}, gpu=False)
    assert isinstance(error, NoRoom)
    assert "tensor_parallel_size 4 x data_parallel_size 2 takes 8 devices" in error.message
    assert "may use 4" in error.message
    assert error.param == "model_kwargs.tensor_parallel_size"


@pytest.mark.parametrize(
    ("arguments", "environ", "gpu"),
    [(spread(tensor=4), {}, False), (spread(tensor=8), {}, True), (spread(tensor=8), {BIND: "nobind"}, False)],
)
@pytest.mark.usefixtures("four")
def test_what_fits_or_is_counted_elsewhere_passes(arguments: VLLMArguments, environ: dict[str, str], gpu: Any) -> None:
    assert too_few_devices(arguments, environ, gpu=gpu) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which processors a process may use")
def test_only_processors_that_this_process_may_use_count() -> None:
    assert processors() == sorted(os.sched_getaffinity(0))


def test_who_shares_the_processors_out_by_hand_is_heard(tmp_path: Path) -> None:
    assert engine_environ({}, tmp_path, processors="0|1")[BIND] == "0|1"
    assert engine_environ({BIND: "2|3"}, tmp_path, processors="0|1")[BIND] == "2|3"
    assert BIND not in engine_environ({}, tmp_path)
