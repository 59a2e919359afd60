"""A server in miniature that loads a model into the fake engine: ``python parent.py RUN_DIR [fake options]``.

Prints the ID of the engine, then ``loaded``, then waits for its end. Needs ``tests`` on its path.
"""

import asyncio
import logging
import sys
from pathlib import Path

from fake_engine_type import FakeVLLMEngineType

from llmkit.engines.base import EngineContext, LoadProgress
from llmkit.schemas import Configuration


async def main() -> None:
    run_dir, *options = sys.argv[1:]
    context = EngineContext(Path(run_dir), Path(run_dir + ".log"), None, logging.getLogger())
    configuration = Configuration(config_id="c", model_id="m", model_name="some/model", model_type="vllm")
    engine = FakeVLLMEngineType(*options).create(configuration, context)

    def report(progress: LoadProgress) -> None:
        print(progress.phase, flush=True)

    print(engine.engine_id, flush=True)
    await engine.start(report)
    print("loaded", flush=True)
    await asyncio.sleep(60)


asyncio.run(main())
