"""The registers of Intel's matrix unit; what comes of them with real vLLM is in `test_real_engine`."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from llmkit.engines.vllm.amx import request_tiles

# Prints which registers the process may use (ARCH_GET_XCOMP_PERM), before and after.
PROGRAM = """
import ctypes
from llmkit.engines.vllm.amx import request_tiles
allowed = ctypes.c_uint64()
for _ in range(2):
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed))
    print(allowed.value >> 18 & 1)
    request_tiles()
"""


def test_vllm_calls_it_in_each_process() -> None:
    (ours,) = entry_points(group="vllm.general_plugins", name="llmkit")
    assert ours.load() is request_tiles


def test_a_processor_without_it_is_none_the_worse() -> None:
    request_tiles()
    request_tiles()


def test_a_process_may_use_them_afterwards() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "amx_tile" not in flags.read_text().split():
        pytest.skip("this processor has no AMX")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "1"]
