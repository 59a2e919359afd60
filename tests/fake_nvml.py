"""A stand-in for `pynvml`, NVIDIA's management library: as many GPUs, processes and faults as a test wants."""

# ruff: noqa: N802  # the names are NVML's

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


@dataclass
class FakeGPU:
    """One GPU; its handle, too.

    Attributes
    ----------
    free
        Bytes; by default what is not used.
    processes
        Pid and bytes of each that computes; None where the driver does not tell the bytes, as on Windows.
    failing
        The NVML error, as a number, that a function has for this GPU.
    """

    total: int = 24 * GIB
    used: int = 0
    free: int | None = None
    name: str = "NVIDIA Fake"
    uuid: str | None = None
    busy: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)


class FakeNVML(ModuleType):
    """The module: the functions that are used, and the real one's errors.

    Parameters
    ----------
    gpus
        In NVML's order.

    Attributes
    ----------
    failing
        The NVML error that a function has for all GPUs.
    fail_from
        From which call on each fails, counted from 0 without ``nvmlInit``; None is never.
    calls
        The names of the functions that were called.
    """

    def __init__(self, *gpus: FakeGPU) -> None:
        super().__init__("pynvml")
        self.gpus = list(gpus)
        self.failing: dict[str, int] = {}
        self.fail_from: int | None = None
        self.calls: list[str] = []
        self.started = False
        for index, gpu in enumerate(self.gpus):
            gpu.uuid = gpu.uuid if gpu.uuid is not None else f"GPU-{index:08x}-0000-4000-8000-000000000000"

    def __getattr__(self, name: str) -> Any:
        """Give errors and constants, which are the real ones'."""
        if name.startswith(("NVMLError", "NVML_")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def _called(self, name: str, gpu: FakeGPU | None = None) -> None:
        self.calls.append(name)
        code = (gpu.failing if gpu else {}).get(name, self.failing.get(name))
        if code is None and not self.started:
            code = pynvml.NVML_ERROR_UNINITIALIZED
        if code is None and self.fail_from is not None and len(self.calls) > self.fail_from:
            code = pynvml.NVML_ERROR_GPU_IS_LOST
        if code is not None:
            raise pynvml.NVMLError(code)

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.failing:
            raise pynvml.NVMLError(self.failing["nvmlInit"])
        self.started = True

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGPU:
        self._called("nvmlDeviceGetHandleByIndex", self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGPU) -> str | None:
        self._called("nvmlDeviceGetUUID", gpu)
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGPU) -> str:
        self._called("nvmlDeviceGetName", gpu)
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGPU) -> SimpleNamespace:
        self._called("nvmlDeviceGetMemoryInfo", gpu)
        free = gpu.total - gpu.used if gpu.free is None else gpu.free
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=free)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGPU) -> SimpleNamespace:
        self._called("nvmlDeviceGetUtilizationRates", gpu)
        return SimpleNamespace(gpu=gpu.busy, memory=0)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGPU) -> list[SimpleNamespace]:
        self._called("nvmlDeviceGetComputeRunningProcesses", gpu)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.processes]
