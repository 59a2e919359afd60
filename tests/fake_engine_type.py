"""The model type ``vllm`` with a program in vLLM's place; everything else of it is real."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from llmkit.engines.vllm.engine import STALL_SECONDS, VLLMEngineType
from llmkit.errors import LLMKitError

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


class FakeVLLMEngineType(VLLMEngineType):
    """Starts ``fake_engine.py``; ``options`` are its own, for example ``--ignore-sigterm``."""

    def __init__(
        self, *options: str, environ: Mapping[str, str] = os.environ, stall_seconds: float = STALL_SECONDS
    ) -> None:
        super().__init__([sys.executable, str(FAKE_ENGINE), *options], environ, stall_seconds)

    def unavailable(self) -> LLMKitError | None:
        return None
