"""The model type ``vllm`` with a program in vLLM's place; everything else of it is real."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from llmkit.engines.base import EngineContext
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.errors import LLMKitError
from llmkit.schemas import Configuration

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


class FakeVLLMEngineType(VLLMEngineType):
    """Starts ``fake_engine.py``; ``options`` are its own, for example ``--ignore-sigterm``."""

    def __init__(self, *options: str, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__([sys.executable, str(FAKE_ENGINE), *options], environ)

    def unavailable(self) -> LLMKitError | None:
        return None


class FakePluginEngineType(FakeVLLMEngineType):
    """The model type ``fake`` for servers in processes of their own, installed by ``PLUGIN`` on their path.

    The options of the program follow the model's name: ``"model_name": "any --setsid --stall-at=weights"``.
    """

    name = "fake"

    def create(self, configuration: Configuration, context: EngineContext) -> VLLMEngine:
        model_name, *options = configuration.model_name.split()
        plain = configuration.model_copy(update={"model_name": model_name})
        return FakeVLLMEngineType(*options).create(plain, context)


TESTS = Path(__file__).parent
PLUGIN = {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "plugin")))}
"""Environment of a program in which the model type ``fake`` is installed."""
