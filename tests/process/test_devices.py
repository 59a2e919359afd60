"""What the machine has, in a cgroup or not, with GPUs or not, and whatever the driver does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from fake_nvml import GIB, FakeGPU, FakeNVML
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import schemas
from llmkit.process.devices import Devices

TOTAL, AVAILABLE = 16 * GIB, 12 * GIB
NO_LIMIT_1 = "9223372036854771712\n"
GONE = 1 << 22
"""No pid: that is the most that Linux counts to."""

Machine = Callable[..., Devices]


def write(folder: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make a machine with 16 GiB, 12 of them available, of a list of control groups and of their files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=TOTAL, available=AVAILABLE))

    def make(groups: str, files: Mapping[str, object]) -> Devices:
        write(tmp_path, {"proc/self/cgroup": groups})
        (tmp_path / "cgroup").mkdir()
        write(tmp_path / "cgroup", files)
        return Devices(FakeNVML(), tmp_path / "proc", tmp_path / "cgroup")

    return make


def ram(devices: Devices) -> tuple[float, float, str]:
    """Give total and free GiB, and what limits them."""
    told = devices.read().ram
    assert told.used_bytes + told.free_bytes == told.total_bytes
    assert devices.free_ram() == told.free_bytes
    return told.total_bytes / GIB, told.free_bytes / GIB, told.limited_by


# -- main memory -------------------------------------------------------------------------------------------


def test_a_limit_of_version_2_counts_and_inactive_files_are_free(machine: Machine) -> None:
    stat = f"anon 1\nactive_file {GIB // 4}\ninactive_file {GIB}\nworkingset 5"
    files = {"a/memory.max": 4 * GIB, "a/memory.current": 3 * GIB, "a/memory.stat": stat}
    assert ram(machine("0::/a", files)) == (4, 2, "cgroup")


def test_a_limit_of_version_1_counts_and_inactive_files_of_the_whole_group_are_free(machine: Machine) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": 4 * GIB,
        "memory/a/memory.usage_in_bytes": 3 * GIB,
        "memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}",
        "memory/memory.limit_in_bytes": NO_LIMIT_1,
    }
    assert ram(machine("4:cpu:/b\n3:memory:/a\n1:name=systemd:/\n0::/", files)) == (4, 2, "cgroup")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a", {"a/memory.max": "max", "a/memory.current": GIB}),
        ("0::/a", {"a/memory.max": 64 * GIB, "a/memory.current": GIB}),
        ("3:memory:/a", {"memory/a/memory.limit_in_bytes": NO_LIMIT_1, "memory/a/memory.usage_in_bytes": GIB}),
        ("3:memory:/a", {"memory/a/memory.limit_in_bytes": 64 * GIB, "memory/a/memory.usage_in_bytes": GIB}),
        ("0::/", {}),
        ("3:memory:/a", {}),
        ("", {}),
        ("nonsense", {}),
        ("0::/a", {"a/memory.max": "what is this", "a/memory.current": ""}),
    ],
)
def test_without_a_limit_below_the_machine_the_machine_counts(
    machine: Machine, groups: str, files: Mapping[str, object]
) -> None:
    assert ram(machine(groups, files)) == (16, 12, "machine")


def test_the_narrowest_of_nested_groups_counts(machine: Machine) -> None:
    files = {
        "a/memory.max": 8 * GIB,
        "a/memory.current": 7 * GIB,
        "a/b/memory.max": 4 * GIB,
        "a/b/memory.current": 1 * GIB,
        "a/b/c/memory.max": "max",
        "a/b/c/memory.current": 1 * GIB,
    }
    # The innermost limit is the smallest, but the others in the outer group leave less than it.
    assert ram(machine("0::/a/b/c", files)) == (4, 1, "cgroup")


def test_a_group_that_holds_nothing_yet_is_limited_all_the_same(machine: Machine) -> None:
    assert ram(machine("0::/a", {"a/memory.max": 2 * GIB, "a/memory.current": 0})) == (2, 2, "cgroup")


def test_a_group_that_may_have_nothing_has_nothing(machine: Machine) -> None:
    assert ram(machine("0::/a", {"a/memory.max": 0, "a/memory.current": 0})) == (0, 0, "cgroup")


def test_a_limit_counts_whose_usage_cannot_be_read(machine: Machine) -> None:
    assert ram(machine("0::/a", {"a/memory.max": 2 * GIB})) == (2, 2, "cgroup")


def test_usage_above_the_limit_leaves_nothing(machine: Machine) -> None:
    assert ram(machine("0::/a", {"a/memory.max": 2 * GIB, "a/memory.current": 3 * GIB})) == (2, 0, "cgroup")


def test_what_the_machine_has_left_counts_where_the_group_has_more(machine: Machine) -> None:
    assert ram(machine("0::/a", {"a/memory.max": 15 * GIB, "a/memory.current": 0})) == (15, 12, "cgroup")


def test_in_a_container_the_mounted_group_is_the_own_one(machine: Machine) -> None:
    files = {"memory.max": 2 * GIB, "memory.current": GIB}
    assert ram(machine("0::/system.slice/docker-abc.scope", files)) == (2, 1, "cgroup")


def test_a_path_that_leads_out_of_the_mounted_groups_ends(machine: Machine) -> None:
    assert ram(machine("0::/../..", {"memory.max": 2 * GIB, "memory.current": GIB})) == (2, 1, "cgroup")


sizes = st.integers(0, 20 * GIB)
levels = st.lists(st.tuples(st.one_of(st.none(), sizes), sizes, sizes), min_size=1, max_size=4)


@settings(deadline=None)  # disks have moods
@given(levels=levels, version=st.sampled_from([1, 2]))
def test_whatever_the_groups_say_the_figures_agree(levels: list[tuple[int | None, int, int]], version: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "cgroup" / ("" if version == 2 else "memory")
        path = "/".join("abcd"[: len(levels)])
        write(Path(place), {"proc/self/cgroup": f"0::/{path}" if version == 2 else f"3:memory:/{path}"})
        for name, (limit, usage, cached) in zip("abcd", levels, strict=False):
            folder /= name
            write(
                folder,
                {
                    names[0]: limit if limit is not None else "max" if version == 2 else NO_LIMIT_1,
                    names[1]: usage,
                    "memory.stat": f"inactive_file {cached}",
                },
            )
        told = Devices(FakeNVML(), Path(place) / "proc", Path(place) / "cgroup").read().ram
    most = psutil.virtual_memory().total
    assert 0 <= told.free_bytes <= told.total_bytes <= most
    assert told.used_bytes + told.free_bytes == told.total_bytes
    assert (told.limited_by == "cgroup") == (told.total_bytes < most)


# -- processor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a", {"a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"a/cpu.max": "25000 100000", "a/b/cpu.max": "50000 100000"}, 0.25),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": 50000, "cpu/a/cpu.cfs_period_us": 100000}, 0.5),
        ("2:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": 50000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000}, 0.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "9900000 100000"}, None),
        ("0::/a", {"a/cpu.max": "50000 0"}, None),
        ("0::/a", {"a/cpu.max": ""}, None),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}, None),
    ],
)
def test_a_quota_of_the_processor_counts(
    machine: Machine, groups: str, files: Mapping[str, object], cores: float | None
) -> None:
    every = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count() or 1
    assert machine(groups, files).read().cpu.cores == (every if cores is None else cores)


def test_the_name_of_the_processor(machine: Machine, tmp_path: Path) -> None:
    devices = machine("", {})
    assert devices.read().cpu.name is None
    (tmp_path / "proc" / "cpuinfo").write_bytes(b"processor\t: 0\nmodel name\t: Fast\xae CPU\n\nmodel name\t: Other\n")
    assert devices.read().cpu.name == "Fast\N{REPLACEMENT CHARACTER} CPU"


def test_a_load_that_is_not_told_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def untold() -> None:
        raise OSError

    assert machine("", {}).read().cpu.load is not None
    monkeypatch.setattr(os, "getloadavg", untold)
    assert Devices(FakeNVML()).read().cpu.load is None


# -- this machine ------------------------------------------------------------------------------------------


def test_this_machine_as_it_is() -> None:
    told = Devices().read()
    assert 0 < told.cpu.cores <= (psutil.cpu_count() or 1)
    assert 0 < told.ram.free_bytes < told.ram.total_bytes <= psutil.virtual_memory().total
    assert told.ram.used_bytes + told.ram.free_bytes == told.ram.total_bytes


def test_the_real_library_without_a_driver_gives_no_gpu_and_says_why() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        why = str(error)
    else:
        pytest.skip("this machine has a driver")
    devices = Devices()
    told = devices.read()
    assert told.gpus == []
    assert told.reason == f"there is no NVIDIA GPU, or no driver: {why}"
    assert devices.gpus_of([os.getpid()]) is None
    assert devices.holders(0) == []


def test_the_library_is_imported_where_somebody_asks_for_gpus() -> None:
    program = (
        "import sys; from llmkit.process.devices import Devices; devices = Devices(); devices.free_ram();"
        "assert 'pynvml' not in sys.modules; devices.read(); assert 'pynvml' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# -- GPUs --------------------------------------------------------------------------------------------------


def test_every_gpu_with_its_figures() -> None:
    nvml = FakeNVML(FakeGPU(24 * GIB, 6 * GIB, name="A", uuid="GPU-a", busy=37), FakeGPU(80 * GIB, name="B"))
    told = Devices(nvml).read()
    assert told.reason is None
    assert told.gpus[0] == schemas.GPUDevice(
        index=0,
        uuid="GPU-a",
        name="A",
        total_bytes=24 * GIB,
        used_bytes=6 * GIB,
        free_bytes=18 * GIB,
        utilization=0.37,
    )
    assert [(gpu.index, gpu.name, gpu.free_bytes) for gpu in told.gpus][1:] == [(1, "B", 80 * GIB)]


def test_the_library_in_place_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(FakeGPU(name="A")))
    assert [gpu.name for gpu in Devices().read().gpus] == ["A"]


def test_without_the_library_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Devices().read().reason == "nvidia-ml-py is not installed"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
    ],
)
def test_a_driver_that_comes_late_is_noticed(code: int, words: str) -> None:
    nvml = FakeNVML(FakeGPU())
    nvml.failing["nvmlInit"] = code
    devices = Devices(nvml)
    told = devices.read()
    assert told.gpus == []
    assert words in str(told.reason)
    assert devices.gpus_of([1]) is None
    del nvml.failing["nvmlInit"]
    assert len(devices.read().gpus) == 1


def test_a_driver_that_was_exchanged_is_started_anew() -> None:
    nvml = FakeNVML(FakeGPU())
    devices = Devices(nvml)
    assert len(devices.read().gpus) == 1
    nvml.started = False
    assert devices.read().reason == "the NVIDIA driver does not answer: Uninitialized"
    assert len(devices.read().gpus) == 1


def test_no_gpu_in_the_machine() -> None:
    assert Devices(FakeNVML()).read().reason == "there is no NVIDIA GPU"


def test_what_a_gpu_does_not_tell_is_missing_and_no_error() -> None:
    no = pynvml.NVML_ERROR_NOT_SUPPORTED
    failing = dict.fromkeys(["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetName", "nvmlDeviceGetUUID"], no)
    (gpu,) = Devices(FakeNVML(FakeGPU(failing=failing))).read().gpus
    assert (gpu.utilization, gpu.name, gpu.uuid, gpu.free_bytes) == (None, "", "", 24 * GIB)


def test_a_gpu_that_is_lost_is_left_out() -> None:
    lost = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST}
    told = Devices(FakeNVML(FakeGPU(failing=lost), FakeGPU())).read()
    assert [gpu.index for gpu in told.gpus] == [1]
    assert told.reason is None
    assert Devices(FakeNVML(FakeGPU(failing=lost))).read().reason == "GPU 0 does not tell its memory: GPU is lost"
    unreachable = {"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_GPU_IS_LOST}
    assert [gpu.index for gpu in Devices(FakeNVML(FakeGPU(failing=unreachable), FakeGPU())).read().gpus] == [1]
    assert Devices(FakeNVML(FakeGPU(failing=unreachable))).read().reason == "no NVIDIA GPU answers"


def test_a_gpu_without_memory_of_its_own_has_the_main_memory() -> None:
    failing = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}
    told = Devices(FakeNVML(FakeGPU(failing=failing))).read()
    (gpu,) = told.gpus
    assert (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes) == (
        told.ram.total_bytes,
        told.ram.used_bytes,
        told.ram.free_bytes,
    )


def test_a_library_that_fails_at_any_call_never_raises() -> None:
    def ask(fail_from: int | None) -> tuple[FakeNVML, schemas.Devices]:
        nvml = FakeNVML(FakeGPU(processes=[(os.getpid(), 1)]), FakeGPU(processes=[(os.getpid(), 2)]))
        nvml.fail_from = fail_from
        devices = Devices(nvml)
        told = devices.read()
        devices.gpus_of([os.getpid()])
        devices.holders(0)
        return nvml, told

    calls = len(ask(None)[0].calls)
    assert calls > 10
    for number in range(calls):
        _, told = ask(number)
        assert bool(told.gpus) != bool(told.reason)
        assert all(gpu.total_bytes for gpu in told.gpus)


# -- which GPUs --------------------------------------------------------------------------------------------

UUIDS = ["GPU-aaaa1111-x", "GPU-aaaa2222-y", "GPU-bbbb3333-z"]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("0", [0]),
        ("2,0", [0, 2]),
        (" 1 , 2 ", [1, 2]),
        ("1,-1,2", [1]),
        ("7,0", []),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("GPU-aaaa2222-y", [1]),
        ("GPU-bbbb,GPU-aaaa1", [0, 2]),
        ("GPU-bbbb,GPU-aaaa", [2]),
        ("GPU-cccc", []),
        ("MIG-GPU-aaaa1111-x/1/0", []),
    ],
)
def test_only_gpus_that_the_server_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: list[int]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = Devices(FakeNVML(*(FakeGPU(uuid=uuid, processes=[(os.getpid(), 5)]) for uuid in UUIDS)))
    told = devices.read()
    assert [gpu.index for gpu in told.gpus] == indices
    assert devices.gpus_of([os.getpid()]) == (dict.fromkeys(indices, 5) or None)
    assert [bool(devices.holders(index)) for index in range(3)] == [index in indices for index in range(3)]
    if not indices:
        assert repr(visible) in str(told.reason)
        assert ("MIG" in str(told.reason)) == (visible is not None and visible.startswith("MIG"))


def test_a_gpu_that_does_not_tell_its_uuid_is_found_by_index_only(monkeypatch: pytest.MonkeyPatch) -> None:
    untold = FakeGPU(failing={"nvmlDeviceGetUUID": pynvml.NVML_ERROR_UNKNOWN})
    devices = Devices(FakeNVML(untold, FakeGPU(uuid="GPU-b")))
    for visible, indices in {"0": [0], "GPU-b": [1], "GPU-": [1]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.index for gpu in devices.read().gpus] == indices


# -- who holds it ------------------------------------------------------------------------------------------


def devices_with(*processes: list[tuple[int, int | None]], **failing: Any) -> Devices:
    return Devices(FakeNVML(*(FakeGPU(processes=each, failing=failing) for each in processes)))


def test_the_share_of_a_process_tree_on_each_gpu() -> None:
    own = os.getpid()
    devices = devices_with([(own, 3), (1, 50)], [(own, 5), (own, 7)], [(1, 9)])
    assert devices.gpus_of([own]) == {0: 3, 1: 12}
    assert devices.gpus_of({own, 1}) == {0: 53, 1: 12, 2: 9}
    assert devices.gpus_of([]) == {}


def test_a_driver_that_does_not_say_is_none_and_not_nothing() -> None:
    own = os.getpid()
    assert devices_with([(own, None)]).gpus_of([own]) is None
    assert devices_with([(own, 3)], [(own, None)]).gpus_of([own]) is None
    assert devices_with([(1, None), (own, 3)]).gpus_of([own]) == {0: 3}
    silent = devices_with([(own, 3)], nvmlDeviceGetComputeRunningProcesses=pynvml.NVML_ERROR_NO_PERMISSION)
    assert silent.gpus_of([own]) is None
    assert silent.holders(0) == []


def test_pids_of_the_host_say_nothing_in_a_container() -> None:
    own = os.getpid()
    assert devices_with([(GONE, 3)]).gpus_of([own]) is None
    assert devices_with([(GONE, 3), (own, 4)]).gpus_of([own]) == {0: 4}
    assert devices_with([(GONE, 3)]).gpus_of([GONE]) == {0: 3}


def test_holders_by_name_those_with_most_first() -> None:
    own = os.getpid()
    devices = devices_with([(GONE, GIB), (own, 3 * GIB), (GONE + 1, None)], [])
    assert devices.holders(0) == [
        f"{psutil.Process().name()} (pid {own}): 3.0 GiB",
        f"a process (pid {GONE}): 1.0 GiB",
        f"a process (pid {GONE + 1})",
    ]
    assert devices.holders(1) == devices.holders(7) == []
