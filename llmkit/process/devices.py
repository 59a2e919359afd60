"""What the machine has: processor, main memory, GPUs, and who holds the memory of a GPU. All methods block."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from llmkit import schemas
from llmkit.schemas import CPUDevice, GPUDevice, RAMDevice

_NO_LIMIT: Final = 1 << 60
"""Bytes; a cgroup of version 1 without a limit says a number near the largest there is."""
_GIB: Final = 1 << 30


class Devices:
    """Looks at the devices of this machine.

    Parameters
    ----------
    nvml
        The functions of NVIDIA's management library, as module ``pynvml`` has them; by default that module.
    proc, cgroup
        Where the kernel tells about processes and control groups.
    """

    def __init__(
        self, nvml: Any | None = None, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._proc = proc
        self._cgroup = cgroup
        self._nvml = nvml
        self._lock = threading.Lock()
        self._started = False
        self._reason: str | None = None

    def read(self) -> schemas.Devices:
        """Give every device, without the shares of models."""
        gpus = [self._gpu(index, handle) for index, handle in self._handles()]
        return schemas.Devices(cpu=self._cpu(), ram=self._ram(), gpus=gpus, reason=None if gpus else self._reason)

    # -- processor and main memory -------------------------------------------------------------------------

    def _cpu(self) -> CPUDevice:
        name = None
        with contextlib.suppress(OSError):
            found = re.search(r"^model name\s*:\s*(.+)$", (self._proc / "cpuinfo").read_text(), re.MULTILINE)
            name = found[1] if found else None
        allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count() or 1
        quota = min((q for folder in self._folders("cpu") if (q := _cpu_quota(folder))), default=None)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return CPUDevice(name=name, cores=min(float(allowed), quota or float(allowed)), load=load)

    def _ram(self) -> RAMDevice:
        machine = psutil.virtual_memory()
        total, free, limited_by = machine.total, machine.available, "machine"
        for folder in self._folders("memory"):
            limit, usage, cached = _memory_limit(folder)
            if limit is None or usage is None:
                continue
            if limit < total:
                total, limited_by = limit, "cgroup"
            free = min(free, max(0, limit - usage + cached))
        return RAMDevice(
            total_bytes=total,
            used_bytes=max(0, total - free),
            free_bytes=free,
            limited_by="cgroup" if limited_by == "cgroup" else "machine",
        )

    def free_ram(self) -> int:
        """Give the bytes that can be had without ending anything."""
        return self._ram().free_bytes

    def _folders(self, controller: str) -> Iterator[Path]:
        """Give the folders of the control groups that this process is in, its own first."""
        try:
            lines = (self._proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            if names and controller not in names.split(","):
                continue
            mount = self._cgroup / controller if names else self._cgroup
            if not mount.is_dir():
                continue
            folder = mount / path.lstrip("/")
            # In a container the path is the host's; what is mounted is then our own group.
            folder = folder if folder.is_dir() else mount
            while True:
                yield folder
                if folder == mount:
                    break
                folder = folder.parent

    # -- GPUs ----------------------------------------------------------------------------------------------

    def _start(self) -> Any | None:
        with self._lock:
            if not self._started:
                self._started = True
                try:
                    if self._nvml is None:
                        import pynvml  # only where somebody asks

                        self._nvml = pynvml
                    self._nvml.nvmlInit()
                except ImportError:
                    self._nvml, self._reason = None, "nvidia-ml-py is not installed"
                except Exception as error:  # noqa: BLE001  # NVML's errors have no common base that is always there
                    self._nvml, self._reason = None, f"there is no NVIDIA GPU, or no driver: {error}"
            return self._nvml

    def _handles(self) -> list[tuple[int, Any]]:
        """Give index and handle of every GPU that this server may use."""
        nvml = self._start()
        if nvml is None:
            return []
        found = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        wanted = None if visible is None else [one.strip() for one in visible.split(",") if one.strip()]
        for index in range(_ask(nvml.nvmlDeviceGetCount) or 0):
            handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            uuid = _text(_ask(nvml.nvmlDeviceGetUUID, handle))
            # UUIDs may be cut short there.
            named = wanted is not None and any(one.startswith("GPU-") and uuid.startswith(one) for one in wanted)
            if wanted is None or str(index) in wanted or named:
                found.append((index, handle))
        if not found:
            self._reason = "no NVIDIA GPU may be used here"
        return found

    def _gpu(self, index: int, handle: Any) -> GPUDevice:
        nvml: Any = self._nvml
        memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = _ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return GPUDevice(
            index=index,
            uuid=_text(_ask(nvml.nvmlDeviceGetUUID, handle)),
            name=_text(_ask(nvml.nvmlDeviceGetName, handle)),
            total_bytes=int(memory.total) if memory else 0,
            used_bytes=int(memory.used) if memory else 0,
            free_bytes=int(memory.free) if memory else 0,
            utilization=rates.gpu / 100 if rates else None,
        )

    def _processes(self, handle: Any) -> list[tuple[int, int | None]]:
        assert self._nvml is not None  # noqa: S101  # there is a handle
        running = _ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return [(int(one.pid), one.usedGpuMemory) for one in running]

    def gpus_of(self, pids: Collection[int]) -> dict[int, int] | None:
        """Give the bytes that some processes hold of each GPU; None if the driver does not say.

        In a container the driver may know the processes by other numbers; then it is none of these.
        """
        held: dict[int, int] = {}
        handles = self._handles()
        for index, handle in handles:
            for pid, used in self._processes(handle):
                if pid in pids:
                    if used is None:
                        return None
                    held[index] = held.get(index, 0) + int(used)
        return held if handles else None

    def holders(self, index: int) -> list[str]:
        """Say who holds memory of a GPU, as far as that can be known."""
        words = []
        for found, handle in self._handles():
            if found != index:
                continue
            for pid, used in self._processes(handle):
                try:
                    name = psutil.Process(pid).name()
                except psutil.Error:
                    name = "a process"
                size = f": {used / _GIB:.1f} GiB" if used else ""
                words.append(f"{name} (pid {pid}){size}")
        return words


def _ask(function: Any, *args: Any) -> Any:
    """Call a function of NVML; None where this device or driver cannot say."""
    try:
        return function(*args)
    except Exception:  # noqa: BLE001  # one figure that is missing is no reason to lose the others
        return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.lstrip("-").isdecimal() else None


def _memory_limit(folder: Path) -> tuple[int | None, int | None, int]:
    """Give limit, usage, and the part of the usage that merely caches files, of one control group."""
    limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= _NO_LIMIT:
        return None, None, 0
    usage = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
    cached = 0
    with contextlib.suppress(OSError):
        text = (folder / "memory.stat").read_text()
        found = re.search(r"^total_inactive_file (\d+)$", text, re.MULTILINE) or re.search(
            r"^inactive_file (\d+)$", text, re.MULTILINE
        )
        cached = int(found[1]) if found else 0
    return limit, usage, cached


def _cpu_quota(folder: Path) -> float | None:
    """Give the cores that a control group allows, or None for all."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None
