"""A registry with a scripted engine, and the endpoint that plays it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mock_upstream import MockUpstream
from registry_stage import RegistryStage


@pytest.fixture
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


@pytest.fixture
def stage(tmp_path: Path, upstream: MockUpstream) -> RegistryStage:
    return RegistryStage(tmp_path, upstream)
