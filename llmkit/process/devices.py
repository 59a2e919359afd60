"""What the machine has: processor, main memory, GPUs, and who holds the memory of a GPU. All methods block."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from llmkit import schemas
from llmkit.schemas import CPUDevice, GPUDevice, RAMDevice

_MEMORY_FILES: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage of a control group, of version 2 and of version 1."""
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

    def read(self) -> schemas.Devices:
        """Give every device, without the shares of models; a GPU that does not tell its memory is left out."""
        ram = self._ram()
        handles, reason = self._look()
        gpus = []
        for index, handle in handles:
            try:
                gpus.append(self._gpu(index, handle, ram))
            except Exception as error:  # noqa: BLE001  # NVML's errors have no common base that is always there
                reason = f"GPU {index} does not tell its memory: {error}"
        return schemas.Devices(cpu=self._cpu(), ram=ram, gpus=gpus, reason=None if gpus else reason)

    # -- processor and main memory -------------------------------------------------------------------------

    def _cpu(self) -> CPUDevice:
        name = None
        with contextlib.suppress(OSError):
            text = (self._proc / "cpuinfo").read_text(errors="replace")
            found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
            name = found[1] if found else None
        allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count() or 1
        quota = min((q for folder in self._folders("cpu") if (q := _cpu_quota(folder))), default=None)
        load = None
        with contextlib.suppress(OSError, AttributeError):  # Windows has none, some containers do not tell it
            load = os.getloadavg()[0]
        return CPUDevice(name=name, cores=min(float(allowed), quota or float(allowed)), load=load)

    def _ram(self) -> RAMDevice:
        machine = psutil.virtual_memory()
        total, free = machine.total, machine.available
        for folder in self._folders("memory"):
            limit, usage, cached = _memory_limit(folder)
            if limit is not None:
                total = min(total, limit)
                free = min(free, max(0, limit - usage + cached))
        return RAMDevice(
            total_bytes=total,
            used_bytes=total - free,
            free_bytes=free,
            limited_by="cgroup" if total < machine.total else "machine",
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
            # Controllers that are mounted together have a folder with all their names, and mostly links with each.
            mounts = [self._cgroup / controller, self._cgroup / names] if names else [self._cgroup]
            mount = next((one for one in mounts if one.is_dir()), None)
            if mount is None:
                continue
            # In a container the path is the host's, and leads nowhere; what is mounted is then our own group.
            folder = mount / path.lstrip("/")
            while True:
                yield folder
                if folder == mount:
                    break
                folder = folder.parent

    # -- GPUs ----------------------------------------------------------------------------------------------

    def _start(self) -> Any:
        """Give NVML, ready for questions; what it raises says why there is none."""
        with self._lock:
            if self._nvml is None:
                import pynvml  # only where somebody asks

                self._nvml = pynvml
            if not self._started:
                self._nvml.nvmlInit()
                self._started = True
            return self._nvml

    def _look(self) -> tuple[list[tuple[int, Any]], str | None]:
        """Give index and handle of every GPU that this server may use, or why there is none.

        The next call tries anew whatever failed: a driver can come late, or be exchanged.
        """
        try:
            nvml = self._start()
        except ImportError:
            return [], "nvidia-ml-py is not installed"
        except Exception as error:  # noqa: BLE001  # as above
            return [], f"there is no NVIDIA GPU, or no driver: {error}"
        try:
            count = nvml.nvmlDeviceGetCount()
        except Exception as error:  # noqa: BLE001  # as above
            self._started = False
            return [], f"the NVIDIA driver does not answer: {error}"
        handles = {index: _ask(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)}
        known = {index: handle for index, handle in handles.items() if handle is not None}
        if not known:
            return [], "no NVIDIA GPU answers" if count else "there is no NVIDIA GPU"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return list(known.items()), None
        uuids = {index: _text(_ask(nvml.nvmlDeviceGetUUID, handle)) for index, handle in known.items()}
        allowed = _visible(visible, uuids)
        if not allowed:
            slices = "; models are not placed on slices of a GPU (MIG)" if "MIG-" in visible else ""
            return [], f"CUDA_VISIBLE_DEVICES of this server is {visible!r}, which is no GPU{slices}"
        return [(index, handle) for index, handle in known.items() if index in allowed], None

    def _gpu(self, index: int, handle: Any, ram: RAMDevice) -> GPUDevice:
        nvml: Any = self._nvml
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total, used, free = int(memory.total), int(memory.used), int(memory.free)
        except nvml.NVMLError_NotSupported:
            # A GPU without memory of its own, as that of a DGX Spark: it works in main memory.
            total, used, free = ram.total_bytes, ram.used_bytes, ram.free_bytes
        rates = _ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return GPUDevice(
            index=index,
            uuid=_text(_ask(nvml.nvmlDeviceGetUUID, handle)),
            name=_text(_ask(nvml.nvmlDeviceGetName, handle)),
            total_bytes=total,
            used_bytes=used,
            free_bytes=free,
            utilization=rates.gpu / 100 if rates else None,
        )

    def _processes(self, handle: Any) -> list[tuple[int, int | None]] | None:
        """Give processes and the bytes that each holds; None if the driver does not say."""
        nvml: Any = self._nvml
        running = _ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        return None if running is None else [(int(one.pid), one.usedGpuMemory) for one in running]

    def gpus_of(self, pids: Collection[int]) -> dict[int, int] | None:
        """Give the bytes that some processes hold of each GPU; None if the driver does not say.

        In a container the driver may know the processes by the host's numbers, which say nothing here. Some drivers
        list none at all there; that cannot be told from processes that hold nothing.
        """
        held: dict[int, int] = {}
        strangers = False
        handles, _ = self._look()
        for index, handle in handles:
            running = self._processes(handle)
            if running is None:
                return None
            for pid, used in running:
                if pid in pids:
                    if used is None:
                        return None
                    held[index] = held.get(index, 0) + int(used)
                else:
                    strangers = strangers or not psutil.pid_exists(pid)
        return held if handles and (held or not strangers) else None

    def holders(self, index: int) -> list[str]:
        """Say who holds memory of a GPU, as far as that can be known; who holds most comes first."""
        handles = dict(self._look()[0])
        running = (self._processes(handles[index]) if index in handles else None) or []
        words = []
        for pid, used in sorted(running, key=lambda one: one[1] or 0, reverse=True):
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


def _visible(variable: str, uuids: Mapping[int, str]) -> set[int]:
    """Give the indices of GPUs that ``CUDA_VISIBLE_DEVICES`` names, read as CUDA does: up to what is no GPU.

    An index counts as in ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, which is NVML's order and that of the engines. A UUID may be
    cut short as long as it is clear.
    """
    found: set[int] = set()
    for word in map(str.strip, variable.split(",")):
        if word.startswith("GPU-"):
            named = [index for index, uuid in uuids.items() if uuid.startswith(word)]
        else:
            named = [index for index in uuids if word.isdecimal() and index == int(word)]
        if len(named) != 1:
            break
        found.update(named)
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _memory_limit(folder: Path) -> tuple[int | None, int, int]:
    """Give limit, usage, and the part of the usage that merely caches files, of one control group, in bytes."""
    names = next((names for names in _MEMORY_FILES if (folder / names[0]).exists()), None)
    limit = _number(folder / names[0]) if names else None
    if names is None or limit is None:
        return None, 0, 0
    usage = _number(folder / names[1]) or 0
    cached = 0
    with contextlib.suppress(OSError):
        text = (folder / "memory.stat").read_text()
        found = re.search(r"^total_inactive_file (\d+)$", text, re.MULTILINE) or re.search(
            r"^inactive_file (\d+)$", text, re.MULTILINE
        )
        cached = min(int(found[1]), usage) if found else 0  # the two are not read at the same moment
    return limit, usage, cached


def _cpu_quota(folder: Path) -> float | None:
    """Give the cores that a control group allows, or None for all."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None
