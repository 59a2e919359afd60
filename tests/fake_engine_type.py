"""The model type ``vllm`` with a program in vLLM's place; everything else of it is real."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmkit.engines.base import EngineContext
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.engines.vllm.environment import engine_environ
from llmkit.engines.vllm.launcher import Launcher
from llmkit.errors import LLMKitError
from llmkit.schemas import Configuration

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
FAKE_STANDBY = Path(__file__).with_name("fake_standby.py")


class FakeVLLMEngineType(VLLMEngineType):
    """Starts ``fake_engine.py``; ``options`` are its own, for example ``--ignore-sigterm``.

    Its standby is ``fake_standby.py``, with the options ``standby``; it becomes the same engine.
    """

    def __init__(self, *options: str, environ: Mapping[str, str] = os.environ, standby: Sequence[str] = ()) -> None:
        super().__init__([sys.executable, str(FAKE_ENGINE), *options], environ)
        command = [sys.executable, str(FAKE_STANDBY), *standby, *(f"--engine={option}" for option in options)]
        self._launcher = Launcher(lambda run_dir: engine_environ(environ, run_dir), command)

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
PLUGIN = {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS), str(TESTS / "plugin")))}
"""Environment of a program in which the model type ``fake`` is installed; llmkit is the one that these tests are of."""
