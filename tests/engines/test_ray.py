"""Models on a Ray cluster, as the registry has them; a folder and a program stand in for the cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine_type import FakeVLLMEngineType
from mock_upstream import ANSWER, MockUpstream
from registry_stage import ask, until

from llmkit.engines import ray
from llmkit.engines.base import Cluster
from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.errors import DoesNotFit, EngineNotInstalled, LLMKitError, NoRoom, NotAllowed, UpstreamUnreachable
from llmkit.process.guardian import marked
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.schemas import Configuration, ModelConfigRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="models are placed on a cluster from Linux only")

LOG = logging.getLogger("test")
PROGRAM = Path(__file__).parent.parent / "fake_ray_application.py"


class FakeType(FakeVLLMEngineType):
    """Remembers the engines that it made."""

    def __init__(self) -> None:
        super().__init__()
        self._ray_command = (sys.executable, str(PROGRAM))
        self.made: list[ray.RayEngine] = []

    def create(self, configuration: Configuration, context: Any) -> Any:
        engine = super().create(configuration, context)
        if isinstance(engine, ray.RayEngine):
            self.made.append(engine)
        return engine


class Stage:
    """A cluster, which is a folder, and servers of one home."""

    def __init__(self, folder: Path, upstream: MockUpstream) -> None:
        self.folder = folder
        self.cluster = folder / "cluster"
        self.cluster.mkdir()
        self.types = FakeType()
        self._http = upstream.base_url.removesuffix("/v1")
        self._servers = 0

    @asynccontextmanager
    async def server(self, *, home: str = "state", **settings: Any) -> AsyncIterator[ModelRegistry]:
        self._servers += 1
        run_dir = Path(self.folder, f"r{self._servers}")
        run_dir.mkdir()
        given = {"ray_address": str(self.cluster), "ray_http_url": self._http, **settings}
        chosen = Settings(state_dir=self.folder / home, run_dir=run_dir, **given)
        registry = ModelRegistry(chosen, lambda event: None, LOG, {}, {"vllm": self.types})
        await registry.start()
        try:
            yield registry
        finally:
            await registry.close()
            mine = [engine for engine in self.types.made if engine._context.run_dir.parent == run_dir]
            assert [one for engine in mine for one in marked(engine.engine_id)] == []

    @property
    def applications(self) -> set[str]:
        return {path.name for path in self.cluster.iterdir() if "." not in path.name and path.name != "not-ready"}

    def say(self, engine: ray.RayEngine, *lines: str) -> None:
        """Let the program of an engine print lines."""
        with (self.cluster / f"{engine.application}.says").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(ray, "version", lambda name: "2.60.0")
    with MockUpstream() as upstream:
        yield Stage(tmp_path, upstream)


def placed(**more: Any) -> dict[str, Any]:
    return {"engine": {"placement": {"ray": {"resources": {"CPU": 1}, **more.pop("ray", {})}, **more}}}


async def configure(registry: ModelRegistry, model_id: str = "m", **fields: Any) -> str:
    body = {"model_id": model_id, "model_name": "some/model", "model_type": "vllm", "model_kwargs": placed(), **fields}
    return (await registry.configure(ModelConfigRequest.model_validate(body))).config_id


def state(**more: Any) -> str:
    told = {"status": "RUNNING", "running": 1, "wanted": 1, "placed": 1, "message": "", **more}
    return ray.MARK + json.dumps({"event": "state", **told})


async def refused(registry: ModelRegistry, config_id: str, kind: type[LLMKitError]) -> LLMKitError:
    with pytest.raises(kind) as caught:
        await registry.load(config_id)
    return caught.value


# -- who may ---------------------------------------------------------------------------------------------------------


async def test_without_an_address_of_the_operator_a_place_on_a_cluster_is_refused(stage: Stage) -> None:
    async with stage.server(ray_address="") as registry:
        config_id = await configure(registry)
        error = await refused(registry, config_id, NotAllowed)
        assert "ray_address" in str(error.hint)
        with pytest.raises(NotAllowed):
            await registry.plan(config_id)
    assert stage.applications == set()


async def test_ray_that_is_not_installed_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise ray.PackageNotFoundError(name)

    monkeypatch.setattr(ray, "version", missing)
    async with stage.server() as registry:
        error = await refused(registry, await configure(registry), EngineNotInstalled)
        assert "llmkit[ray]" in str(error.hint)


async def test_a_model_on_the_cluster_takes_no_memory_of_this_machine(stage: Stage) -> None:
    async with stage.server(max_loaded_models=1) as registry:
        plan = await registry.plan(await configure(registry))
        assert plan.estimate is None
        assert plan.fits


@pytest.mark.parametrize(
    ("placement", "path"),
    [
        ({"ray": {"replicas": {"min": 3, "max": 2}}}, "placement.ray.replicas"),
        ({"ray": {"replicas": {"min": -1}}}, "placement.ray.replicas.min"),
        ({"ray": {"resources": {}}}, "placement.ray.resources"),
        ({"ray": {"resources": {"GPU": -1}}}, "placement.ray.resources.GPU"),
        ({"ray": {"address": "elsewhere:6379"}}, "placement.ray.address"),
        ({"keep": True}, "placement.ray"),
    ],
)
async def test_what_cannot_be_asked_for_is_named(stage: Stage, placement: dict[str, Any], path: str) -> None:
    async with stage.server() as registry:
        with pytest.raises(DoesNotFit) as caught:
            await configure(registry, model_kwargs={"engine": {"placement": placement}})
        assert path in caught.value.message


async def test_data_parallel_does_not_go_with_replicas(stage: Stage) -> None:
    async with stage.server() as registry:
        kwargs = {"engine": {**placed()["engine"], "data_parallel_size": 2}}
        with pytest.raises(DoesNotFit, match="replicas"):
            await configure(registry, model_kwargs=kwargs)


# -- its life --------------------------------------------------------------------------------------------------------


async def test_load_ask_unload(stage: Stage) -> None:
    async with stage.server() as registry:
        config_id = await configure(registry)
        for _ in range(3):
            await registry.load(config_id)
            model = registry.model("m")
            assert (model.status, model.reason, model.capabilities.api) == ("loaded", None, "chat")
            assert model.memory.reason == "runs on the Ray cluster"
            assert len(stage.applications) == 1
            assert (await registry.requests.infer(ask("m"))).response == ANSWER  # type: ignore[union-attr]
            freed = await registry.unload("m")
            assert freed.verified
            assert stage.applications == set()


async def test_an_application_that_is_not_kept_goes_with_the_server(stage: Stage) -> None:
    async with stage.server() as registry:
        await registry.load(await configure(registry))
        assert len(stage.applications) == 1
    assert stage.applications == set()


async def test_a_kept_application_outlives_the_server_and_is_found_again(stage: Stage) -> None:
    async with stage.server() as registry:
        config_id = await configure(registry, model_kwargs=placed(keep=True))
        await registry.load(config_id)
        before = stage.applications
    assert stage.applications == before != set()
    async with stage.server() as registry:
        await registry.load(config_id)
        assert stage.applications == before
        assert '"adopted": true' in stage.types.made[-1]._context.log_file.read_text()
        assert (await registry.unload("m")).verified
    assert stage.applications == set()


async def test_homes_servers_and_models_never_share_a_name(stage: Stage) -> None:
    async with stage.server() as one, stage.server() as two, stage.server(home="other") as three:
        first = await configure(one)
        await until(lambda: bool(two.configurations()))
        await asyncio.gather(one.load(first), two.load(first), three.load(await configure(three)))
        await one.load(await configure(one, "m.1"))
        await one.load(await configure(one, "m:1"))
        assert len(stage.applications) == 5
        await one.unload("m")
        assert len(stage.applications) == 4
        assert two.model("m").status == three.model("m").status == "loaded"
    assert stage.applications == set()


async def test_an_unload_in_a_load_deletes_what_was_deployed(stage: Stage) -> None:
    (stage.cluster / "not-ready").touch()
    async with stage.server() as registry:
        config_id = await configure(registry, model_kwargs=placed(keep=True))
        load = asyncio.create_task(registry.load(config_id))
        await until(lambda: bool(stage.applications) and registry.model("m").phase == "weights")
        await registry.unload("m")
        with pytest.raises(LLMKitError):
            await load
        assert stage.applications == set()


# -- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_cluster_that_is_not_there(stage: Stage) -> None:
    async with stage.server(ray_address=str(stage.folder / "nowhere")) as registry:
        error = await refused(registry, await configure(registry), UpstreamUnreachable)
        assert "nowhere" in error.message
        assert registry.model("m").status == "failed"


async def test_a_failure_on_the_cluster_is_told_in_the_words_of_vllm(stage: Stage) -> None:
    (stage.cluster / "not-ready").touch()
    async with stage.server() as registry:
        load = asyncio.create_task(registry.load(await configure(registry)))
        await until(lambda: bool(stage.applications))
        stage.say(
            stage.types.made[0],
            "[abc123] (EngineCore pid=7) ValueError: The number of heads is wrong.",
            ray.MARK + json.dumps({"event": "failed", "code": "deploy_failed", "message": "replica failed to start"}),
        )
        with pytest.raises(LLMKitError, match="number of heads"):
            await load
        told = registry.model("m").error
        assert told is not None
        assert any("number of heads" in line for line in told.log_tail or [])


async def test_a_cluster_without_room_says_so(stage: Stage) -> None:
    (stage.cluster / "not-ready").touch()
    async with stage.server(stall_seconds=1.0) as registry:
        load = asyncio.create_task(registry.load(await configure(registry)))
        await until(lambda: bool(stage.applications))
        stage.say(stage.types.made[0], state(status="DEPLOYING", running=0, placed=0, message="GPU: 1 is not there"))
        await until(lambda: registry.model("m").phase == "queued")
        with pytest.raises(NoRoom, match="GPU: 1 is not there"):
            await load
    assert stage.applications == set()


async def test_a_lost_replica_is_told_until_it_is_back(stage: Stage) -> None:
    async with stage.server() as registry:
        await registry.load(await configure(registry, model_kwargs=placed(ray={"replicas": {"min": 2}})))
        engine = stage.types.made[0]
        stage.say(engine, state(running=1, wanted=2))
        await until(lambda: registry.model("m").reason is not None)
        model = registry.model("m")
        assert model.status == "loaded"
        assert "1 of 2 replicas is there" in str(model.reason)
        stage.say(engine, state(running=2, wanted=2))
        await until(lambda: registry.model("m").reason is None)


async def test_replicas_that_do_not_come_back_fail_the_model(stage: Stage) -> None:
    async with stage.server(stall_seconds=1.0) as registry:
        await registry.load(await configure(registry))
        stage.say(stage.types.made[0], state(status="UNHEALTHY", running=0, message="no node"))
        await until(lambda: registry.model("m").status == "failed")
        assert "no node" in str(registry.model("m").reason)


async def test_an_application_that_somebody_deletes_fails_the_model(stage: Stage) -> None:
    async with stage.server() as registry:
        await registry.load(await configure(registry))
        gone = ray.MARK + json.dumps({"event": "failed", "code": "gone", "message": "Somebody deleted it."})
        stage.say(stage.types.made[0], gone)
        await until(lambda: registry.model("m").status == "failed")
        assert registry.model("m").reason == "Somebody deleted it."


async def test_a_program_that_is_lost_takes_its_application_along(stage: Stage) -> None:
    async with stage.server() as registry:
        await registry.load(await configure(registry))
        stage.say(stage.types.made[0], "quit")
        await until(lambda: registry.model("m").status == "failed")
        await until(lambda: stage.applications == set())


# -- what is ordered -------------------------------------------------------------------------------------------------


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(model_id: str = "m", **engine: Any) -> dict[str, Any]:
        from llmkit.engines.base import EngineContext

        given = {**placed()["engine"], **engine}
        configuration = Configuration(
            config_id="c", model_id=model_id, model_name="n", model_type="vllm", model_kwargs={"engine": given}
        )
        cluster = Cluster("127.0.0.1:6379", "0123456789")
        context = EngineContext(tmp_path / "s1" / "e", tmp_path / "l", None, LOG, cluster=cluster)
        environ = {"HF_TOKEN": "hf_secret", "OPENAI_API_KEY": "sk", "RAY_AUTH_TOKEN": "t", "RAY_ADDRESS": "a"}
        engine_made = ray.RayEngine(configuration, context, "n", VLLMArguments.model_validate(given), environ)
        return {**engine_made._order, "_environ": engine_made._environ}

    return make


def test_the_order_holds_no_key_and_the_program_gets_only_the_way_to_the_cluster(
    order: Callable[..., dict[str, Any]],
) -> None:
    made = order()
    assert made["_environ"]["RAY_AUTH_TOKEN"] == "t"
    assert not {"RAY_ADDRESS", "HF_TOKEN", "OPENAI_API_KEY"} & made["_environ"].keys()
    assert "hf_secret" not in json.dumps({**made, "_environ": None})
    assert made["environ"]["VLLM_TARGET_DEVICE"] == "cpu"
    assert made["environ"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_another_configuration_is_another_deployment(order: Callable[..., dict[str, Any]]) -> None:
    assert order()["deployment"] == order()["deployment"]
    assert order()["deployment"] != order(max_model_len=100)["deployment"]
    assert order()["name"] == order(max_model_len=100)["name"]


@pytest.mark.parametrize("model_id", ["a" * 128, "a.b:c@d_e", "A-b--c"])
def test_names_are_fit_for_urls(order: Callable[..., dict[str, Any]], model_id: str) -> None:
    name = order(model_id)["name"]
    assert name.replace("-", "").isalnum()
    assert len(name) < 110


def test_the_engine_fetches_nothing_for_a_request(order: Callable[..., dict[str, Any]]) -> None:
    assert order()["engine_kwargs"]["allowed_media_domains"] == ["none.invalid"]
    assert "placement" not in order()["engine_kwargs"]


def test_a_home_keeps_its_name(tmp_path: Path) -> None:
    one = ray.open_cluster("a:1", "", tmp_path / "x")
    assert one == ray.open_cluster("a:1", "", tmp_path / "x")
    other = ray.open_cluster("a:1", "", tmp_path / "y")
    assert one is not None
    assert other is not None
    assert one.owner != other.owner
    assert ray.open_cluster("", "", tmp_path / "z") is None
    assert not (tmp_path / "z").exists()
