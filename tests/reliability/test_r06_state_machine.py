"""R6: any order of configure, load, unload, infer, delete, crash, restart, leave, disk full: as a simple model says."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from scripted_engine import ScriptedEngine, ScriptedEngineType
from support import scaled

from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    DiskFull,
    LLMKitError,
    LoadCancelled,
    LoadFailed,
    ModelIsLoaded,
    ModelNotFound,
    ModelNotLoaded,
)
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.schemas import InferenceRequest, ModelConfigRequest

T = TypeVar("T")
STEPS_EACH = 50
EXAMPLES = scaled(300)
NAMES = st.sampled_from(["a", "b", "c"])
SECONDS = 10.0
steps = 0


@dataclass
class Expected:
    """What the simple model knows of one configuration."""

    config_id: str
    description: str | None
    status: str = "unloaded"


async def answer(_: web.Request) -> web.Response:
    message = {"role": "assistant", "content": "yes"}
    return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


class RegistryMachine(RuleBasedStateMachine):
    """Does to a registry what people do, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lk-r6-"))
        self.loop = asyncio.new_event_loop()
        self.expected: dict[str, Expected] = {}
        self.stopped: list[ScriptedEngine] = []
        self.run(self._serve())
        self.run(self._open())

    def run(self, work: Awaitable[T]) -> T:
        global steps  # noqa: PLW0603  # the figure that is printed
        steps += 1

        async def bounded() -> T:
            return await asyncio.wait_for(asyncio.ensure_future(work), SECONDS)

        return self.loop.run_until_complete(bounded())

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"  # type: ignore[attr-defined]

    async def _open(self) -> None:
        self.engine_type = ScriptedEngineType(self.url, ready=True)
        run_dir = self.folder / "run"
        run_dir.mkdir(exist_ok=True)
        self.registry = ModelRegistry(
            Settings(state_dir=self.folder / "state", run_dir=run_dir),
            lambda event: None,
            logging.getLogger("test"),
            {},
            {"scripted": self.engine_type},
        )
        await self.registry.start()

    def fails(self, kind: type[LLMKitError], work: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(kind):
            self.run(work())

    def request(self, name: str, description: str | None = None) -> ModelConfigRequest:
        return ModelConfigRequest(model_id=name, model_name="n", model_type="scripted", description=description)

    # -- what people do ------------------------------------------------------------------------------------

    @rule(name=NAMES, description=st.sampled_from([None, "x"]))
    def configure(self, name: str, description: str | None) -> None:
        known = self.expected.get(name)
        request = self.request(name, description)
        if known is not None and known.description != description:
            self.fails(ConfigurationExists, lambda: self.registry.configure(request))
            return
        stored = self.run(self.registry.configure(request))
        if known is None:
            self.expected[name] = Expected(stored.config_id, description)
        assert stored.config_id == self.expected[name].config_id

    @rule(name=NAMES, description=st.sampled_from([None, "y"]))
    def update(self, name: str, description: str | None) -> None:
        if name in self.expected:
            self.run(self.registry.update(self.expected[name].config_id, self.request(name, description)))
            self.expected[name].description = description

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        if name not in self.expected:
            self.fails(ConfigurationNotFound, lambda: self.registry.load("no-such-id"))
            return
        assert self.run(self.registry.load(self.expected[name].config_id)).status == "loaded"
        self.expected[name].status = "loaded"

    @rule(name=NAMES, callers=st.integers(2, 4))
    def load_together(self, name: str, callers: int) -> None:
        if name in self.expected:
            before = len(self.engine_type.engines)

            async def together() -> None:
                await asyncio.gather(*(self.registry.load(self.expected[name].config_id) for _ in range(callers)))

            self.run(together())
            assert len(self.engine_type.engines) - before == (self.expected[name].status != "loaded")
            self.expected[name].status = "loaded"

    @rule(name=NAMES)
    def load_that_fails(self, name: str) -> None:
        known = self.expected.get(name)
        if known is not None and known.status != "loaded":
            self.engine_type.failure = LoadFailed("no")
            self.fails(LoadFailed, lambda: self.registry.load(known.config_id))
            self.engine_type.failure = None
            known.status = "failed"

    @rule(name=NAMES)
    def load_that_is_cancelled(self, name: str) -> None:
        known = self.expected.get(name)
        if known is None or known.status == "loaded":
            return
        self.engine_type.ready = False

        async def cancelled() -> None:
            loading = asyncio.create_task(self.registry.load(known.config_id))
            await asyncio.sleep(0.002)
            await self.registry.unload(name)
            with pytest.raises(LoadCancelled):
                await loading

        self.run(cancelled())
        self.engine_type.ready = True
        known.status = "unloaded"

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name not in self.expected:
            self.fails(ModelNotFound, lambda: self.registry.unload(name))
            return
        assert self.run(self.registry.unload(name)).verified
        self.expected[name].status = "unloaded"

    @rule(name=NAMES)
    def infer(self, name: str) -> None:
        request = InferenceRequest(model_id=name, prompt="?")
        known = self.expected.get(name)
        if known is None:
            self.fails(ModelNotFound, lambda: self.registry.requests.infer(request))
        elif known.status != "loaded":
            self.fails(ModelNotLoaded, lambda: self.registry.requests.infer(request))
        else:
            assert self.run(self.registry.requests.infer(request)).response == "yes"

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        """A client goes away in the middle of its request."""
        known = self.expected.get(name)
        if known is None or known.status != "loaded":
            return

        async def left() -> None:
            asking = asyncio.create_task(self.registry.requests.infer(InferenceRequest(model_id=name, prompt="?")))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])

        self.run(left())
        assert self.registry.model(name).in_flight == 0

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        known = self.expected.get(name)
        if known is None:
            self.fails(ConfigurationNotFound, lambda: self.registry.delete("no-such-id"))
        elif known.status == "loaded":
            self.fails(ModelIsLoaded, lambda: self.registry.delete(known.config_id))
        else:
            self.run(self.registry.delete(known.config_id))
            del self.expected[name]

    @rule(name=NAMES)
    def delete_with_unload(self, name: str) -> None:
        if name in self.expected:
            self.run(self.registry.delete(self.expected.pop(name).config_id, unload=True))

    # -- what happens to them ------------------------------------------------------------------------------

    @rule(name=NAMES, waiting=st.booleans())
    def crash(self, name: str, waiting: bool) -> None:  # hypothesis gives it by name
        known = self.expected.get(name)
        if known is None or known.status != "loaded":
            return

        async def crashed() -> None:
            model = self.registry._models[name]
            engine = model._engine
            assert isinstance(engine, ScriptedEngine)
            engine.ended.set()
            while model.status == "loaded":
                await asyncio.sleep(0)
            if waiting:
                while not engine.stops:
                    await asyncio.sleep(0)

        self.run(crashed())
        known.status = "failed"

    @rule()
    def restart_the_server(self) -> None:
        self.run(self.registry.close())
        self.stopped += self.engine_type.engines
        self.run(self._open())
        for known in self.expected.values():
            known.status = "unloaded"

    @precondition(lambda self: "d" not in self.expected)
    @rule()
    def disk_full(self) -> None:
        """Nothing more can be written; what is there can be read, and goes on when there is room again."""
        store = self.registry._stored._store
        assert store is not None
        connection = store._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        try:
            big = self.request("d").model_copy(update={"model_kwargs": {}, "description": "x" * 2000})
            for number in range(40):
                try:
                    stored = self.run(self.registry.configure(big.model_copy(update={"model_id": f"d{number}"})))
                except DiskFull:
                    break
                self.expected[f"d{number}"] = Expected(stored.config_id, "x" * 2000)
            else:
                raise AssertionError("the disk did not become full")
        finally:
            connection.execute("PRAGMA max_page_count = 1073741823")
        for name in [name for name in self.expected if name.startswith("d")]:
            self.run(self.registry.delete(self.expected.pop(name).config_id))

    # -- what always holds ---------------------------------------------------------------------------------

    @invariant()
    def the_registry_is_as_expected(self) -> None:
        told = {c.model_id: (c.config_id, c.description) for c in self.registry.configurations()}
        assert told == {name: (e.config_id, e.description) for name, e in self.expected.items()}
        states = {m.model_id: m.status for m in self.registry.snapshot().models}
        assert states == {name: e.status for name, e in self.expected.items()}
        assert set(self.registry.loaded_models()) == {n for n, e in self.expected.items() if e.status == "loaded"}

    @invariant()
    def only_engines_of_loaded_models_run(self) -> None:
        running = [e for e in self.engine_type.engines if not e.stops and not e.ended.is_set()]
        assert len(running) == sum(e.status == "loaded" for e in self.expected.values())
        assert all(engine.stops for engine in self.stopped)

    def teardown(self) -> None:
        async def end() -> None:
            await self.registry.close()
            await self.runner.cleanup()
            await self.loop.shutdown_default_executor()

        self.run(end())
        pending = asyncio.all_tasks(self.loop)
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not pending, f"tasks that nobody ended: {pending}"


@pytest.mark.timeout(1200)
def test_r06_the_registry_behaves_as_a_simple_model_says() -> None:
    run_state_machine_as_test(
        RegistryMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS_EACH,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
    print(f"\nR6: {EXAMPLES} runs, {steps} steps, no difference")
    assert steps >= scaled(10_000)
