"""What lets vLLM use the matrix unit of Intel's processors (AMX) from the first token on.

Linux gives a process that unit's registers only when asked (`arch_prctl(2)`). vLLM's attention uses them without
asking, and what asks before it is a matrix product of more than four rows: an engine that has not warmed up, as the
demo model's does not, was killed by a first prompt of four tokens or fewer. vLLM calls `request_tiles` as a plugin,
in each of its processes.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Final

_SYS_ARCH_PRCTL: Final = 158
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XFEATURE_XTILE_DATA: Final = 18


def request_tiles() -> None:
    """Ask Linux for the registers; where there are none, it says no, and nothing needs them."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILE_DATA)
