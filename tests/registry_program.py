"""A registry in a process of its own, without Jupyter: ``python registry_program.py STATE_DIR RUN_BASE``.

Takes one JSON command a line, answers one JSON line to each: ``{"do": "configure", ...}``. Commands run one after
the other; it ends its engines at the end of its input, and leaves them to their guardians when it is killed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from fake_engine_type import FakePluginEngineType

from llmkit.errors import LLMKitError
from llmkit.process.folders import ServerFolder
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.schemas import ModelConfigRequest


async def perform(registry: ModelRegistry, command: dict[str, Any]) -> Any:
    """Do what a command says."""
    do, fields = command.pop("do"), command
    if do == "configure":
        return (await registry.configure(ModelConfigRequest.model_validate(fields))).config_id
    if do == "update":
        config_id = fields.pop("config_id")
        return (await registry.update(config_id, ModelConfigRequest.model_validate(fields))).config_id
    if do == "delete":
        return await registry.delete(fields["config_id"])
    if do == "load":
        return (await registry.load(fields["config_id"], wait=fields.get("wait", True))).status
    if do == "unload":
        return (await registry.unload(fields["model_id"])).verified
    if do == "status":
        return {m.model_id: [m.status, m.reason] for m in registry.snapshot().models}
    if do == "configurations":
        return [c.to_wire() for c in registry.configurations()]
    raise AssertionError(do)


async def main(state_dir: Path, run_base: Path) -> None:
    folder = await asyncio.to_thread(ServerFolder, run_base)
    reaped = await asyncio.to_thread(folder.remove_abandoned)
    settings = Settings(state_dir=state_dir, run_dir=folder.path, url=f"http://test/{folder.path.name}/")
    types = {"fake": FakePluginEngineType()}
    registry = ModelRegistry(settings, lambda event: None, logging.getLogger("test"), {}, types)
    await registry.start()
    print(json.dumps({"folder": str(folder.path), "reaped": len(reaped)}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            told = {"ok": await perform(registry, json.loads(line))}
        except LLMKitError as error:
            told = {"error": error.code, "message": error.message}
        print(json.dumps(told), flush=True)
    await registry.close()
    await asyncio.to_thread(folder.remove)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
