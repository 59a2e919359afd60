"""jupyter llmkit as a service of a real JupyterHub: its own proxy, tokens and single-user servers, as documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub import Hub
from hub_service import AFTER, BEFORE, DOCUMENTED, KEY, PAGE, config, person, wait_for_service
from kernels import ServerKernel
from mock_upstream import ANSWER, USAGE, MockUpstream
from support import DEMO, LOAD_SECONDS, QUESTION, START_SECONDS, free_port, own_environment, wait_until

from llmkit.cli import main
from llmkit.client import Client, Watcher, connect
from llmkit.errors import KeyNotAllowed, LLMKitError, NotAllowed, RefusedByOperator, RequestNotFound

pytestmark = [pytest.mark.hub, pytest.mark.timeout(6 * START_SECONDS)]


@pytest.fixture(scope="module")
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream(key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    port = free_port()
    with Hub(config(port)) as running:
        wait_for_service(running)
        yield running


@pytest.fixture(scope="module")
def teacher(hub: Hub) -> Iterator[Client]:
    with person(hub, "grace") as client:
        yield client


@pytest.fixture(scope="module")
def student(hub: Hub) -> Iterator[Client]:
    with person(hub, "sam") as client:
        yield client


@pytest.fixture(scope="module")
def model(teacher: Client, upstream: MockUpstream) -> str:
    """Give a model that the teacher has loaded, with the key of the class."""
    teacher.configure("gpt", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"})
    teacher.load("gpt", progress=False)
    return "gpt"


@pytest.fixture
def adas(hub: Hub) -> Iterator[Client]:
    """Give a client of ada, who has configured and loaded ``adas``."""
    with person(hub, "ada") as ada:
        ada.configure("adas", "any", "fake")
        ada.load("adas", progress=False)
        yield ada
        ada.delete("adas", unload=True)


# -- who may --------------------------------------------------------------------------------------------------


def test_scopes_say_who_may_prompt_load_and_administer(hub: Hub, teacher: Client, student: Client) -> None:
    assert teacher.permissions() == {"read", "execute", "write"}
    assert student.permissions() == {"read", "execute"}
    with person(hub, "ada") as loader:
        assert loader.permissions() == {"read", "execute", "write"}
    with pytest.raises(NotAllowed):
        student.configure("mine", "gpt-3", "openai")
    with pytest.raises(NotAllowed):
        connect(f"{hub.url}services/llmkit/", "wrong")
    assert httpx.get(f"{hub.url}services/llmkit/llm/models/", trust_env=False).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "api/shutdown"), ("POST", "api/events"), ("GET", "llm/keys/"), ("POST", "llm/keys/")]
)
def test_what_nobody_named_is_the_administrators_alone(hub: Hub, method: str, path: str) -> None:
    body = {"name": "mine", "schema_id": "https://llmkit.org/events/model/v1", "version": "1", "data": {}}
    with person(hub, "ada") as loader:
        answer = loader.connection.raw(method, path, json=body if method == "POST" else None)
    assert answer.status_code == 403, answer.text


def test_a_student_asks_with_the_key_of_the_class_and_never_sees_it(
    student: Client, model: str, upstream: MockUpstream
) -> None:
    assert str(student.prompt(model, "Hello")) == ANSWER
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {KEY}"
    pieces = list(student.stream(model, "Hello"))
    assert len(pieces) > 1
    assert "".join(pieces) == ANSWER
    with student.openai() as openai:
        answer = openai.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}])
    assert answer.choices[0].message.content == ANSWER
    for path in ("configurations/", "models/", "requests/", "health", "devices", f"models/{model}/logs"):
        assert KEY not in student.connection.raw("GET", f"llm/{path}").text


def test_what_changes_is_told_through_the_proxy(student: Client, adas: Client) -> None:
    seen: list[tuple[str, str | None]] = []
    watcher = Watcher(student)

    def listen(watcher: Watcher) -> None:
        if watcher.snapshot is not None:
            seen.extend((m.status, m.loaded_by) for m in watcher.snapshot.models if m.model_id == "adas")

    end = watcher.subscribe(listen)
    try:
        wait_until(lambda: ("loaded", "ada") in seen, "the first look", START_SECONDS)
        adas.unload("adas")
        wait_until(lambda: ("unloaded", None) in seen, "the unload is told", START_SECONDS)
        adas.load("adas", progress=False)
        wait_until(lambda: seen[-1] == ("loaded", "ada"), "the load is told", START_SECONDS)
        assert ("loading", "ada") in seen
    finally:
        end()
        watcher.close()


def test_a_stream_comes_through_while_it_goes_on(student: Client, model: str, upstream: MockUpstream) -> None:
    upstream.never_end("word ", 0.2)
    try:
        with student.stream(model, "Hello") as stream:
            pieces = iter(stream)
            assert next(pieces) == "word "  # nobody on the way waits for its end, which never comes
            assert upstream.open_streams == 1
        wait_until(lambda: upstream.aborted, "who leaves ends it", START_SECONDS)
    finally:
        upstream.respond = None


def test_who_waits_is_told_where_through_the_proxy(teacher: Client, student: Client, upstream: MockUpstream) -> None:
    kwargs = {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"}
    teacher.configure("one", "gpt-3", "openai", kwargs, max_in_flight=1)
    teacher.load("one", progress=False)
    upstream.never_end("word ", 0.2)
    body = {"model_id": "one", "prompt": "Hello", "inference_kwargs": {"stream": True}}
    try:
        with teacher.stream("one", "Hello") as theirs:
            assert next(theirs) == "word "
            with student.connection.stream("POST", "llm/inference/", json=body, seconds=START_SECONDS) as waiting:
                lines = waiting.iter_lines()
                assert next(lines) == ": queued, position 1"  # the proxy does not keep it back
                theirs.close()
                assert json.loads(next(line for line in lines if line.startswith("data:"))[5:])["delta"] == "word "
    finally:
        upstream.respond = None
        teacher.delete("one", unload=True)


# -- whose it is ----------------------------------------------------------------------------------------------


def test_what_somebody_has_made_others_do_not_change(hub: Hub, adas: Client, teacher: Client) -> None:
    (told,) = (one for one in adas.configurations() if one.model_id == "adas")
    assert told.configured_by == "ada"
    assert (adas.model("adas").configured_by, adas.model("adas").loaded_by) == ("ada", "ada")
    with person(hub, "ben") as ben:
        for attempt in (
            lambda: ben.update("adas", description="mine"),
            lambda: ben.unload("adas"),
            lambda: ben.delete("adas", unload=True),
        ):
            with pytest.raises(NotAllowed, match="that of ada"):
                attempt()
        with pytest.raises(NotAllowed, match="force"):
            ben.load("adas", force=True, progress=False)
        assert ben.model("adas").status == "loaded"
    assert adas.update("adas", description="ours").description == "ours"
    assert teacher.update("adas", description="the class's").configured_by == "ada"
    teacher.unload("adas")
    assert adas.model("adas").loaded_by is None


def test_who_loads_what_somebody_else_configured_unloads_it(hub: Hub, adas: Client) -> None:
    adas.unload("adas")
    with person(hub, "ben") as ben:
        ben.load("adas", progress=False)
        assert ben.model("adas").loaded_by == "ben"
        with pytest.raises(NotAllowed, match="load of `adas` is that of ben"):
            adas.delete("adas", unload=True)
        ben.unload("adas")


def test_get_then_put_changes_nothing(adas: Client) -> None:
    config_id = adas.model("adas").config_id
    told = adas.connection.call("GET", f"llm/configuration/{config_id}")
    assert told["configured_by"] == "ada"
    assert adas.connection.call("PUT", f"llm/configuration/{config_id}", json=told) == told
    assert adas.connection.call("PUT", f"llm/configuration/{config_id}", json={**told, "configured_by": "ben"}) == told


def test_a_key_of_the_service_goes_to_no_endpoint_of_a_users_own(hub: Hub, upstream: MockUpstream) -> None:
    seen = len(upstream.requests)
    with person(hub, "ada") as ada:
        for api_key in ("env:CLASS_API_KEY", "env:JUPYTERHUB_API_TOKEN", "sk-own", None):
            kwargs: dict[str, Any] = {"base_url": upstream.base_url} | ({"api_key": api_key} if api_key else {})
            with pytest.raises((RefusedByOperator, KeyNotAllowed)):
                ada.configure("thief", "gpt-3", "openai", kwargs)
    assert len(upstream.requests) == seen


# -- requests -------------------------------------------------------------------------------------------------


def test_a_user_sees_and_ends_their_own_requests_alone(
    hub: Hub, teacher: Client, student: Client, model: str, upstream: MockUpstream
) -> None:
    student.prompt(model, "Hello")
    with person(hub, "ben") as ben:
        ben.prompt(model, "Hello")
        assert {one.user for one in ben.requests().recent} == {"ben"}
        upstream.never_end("word ", 0.05)
        try:
            with student.stream(model, "Hello", request_id="sams") as stream:
                next(iter(stream))
                assert [one.user for one in student.requests().running] == ["sam"]
                assert ben.requests().running == []
                with pytest.raises(RequestNotFound):
                    ben.cancel("sams")
                assert "sams" in [one.request_id for one in teacher.requests().running]
                student.cancel("sams")
                with pytest.raises(LLMKitError):
                    for _ in stream:
                        pass
        finally:
            upstream.respond = None
    assert {"sam", "ben"} <= {one.user for one in teacher.requests().recent}


def test_usage_is_kept_by_name(teacher: Client, student: Client, model: str) -> None:
    def tokens(client: Client) -> dict[str, int]:
        told = client.connection.call("GET", "llm/usage/")["usage"]
        return {one["user"]: one["tokens"] for one in told if one["model_id"] == model}

    student.prompt(model, "Hello")
    before = tokens(student)
    assert before.keys() == {"sam"}
    teacher.prompt(model, "Hello")
    student.prompt(model, "Hello")
    assert tokens(student)["sam"] - before["sam"] == USAGE["total_tokens"]
    assert tokens(teacher).keys() > {"sam"}
    table = teacher.connection.raw("GET", "llm/usage.csv")
    assert table.headers["Content-Type"].startswith("text/csv")
    assert table.text.splitlines()[0] == "day,user,model_id,requests,tokens"
    assert f",sam,{model}," in table.text
    (mine,) = [one for one in student.usage() if one.model_id == model]
    assert (mine.user, mine.tokens) == ("sam", tokens(student)["sam"])
    assert set(teacher.usage().to_frame()["user"]) > {"sam"}


def test_usage_in_a_terminal(
    hub: Hub, student: Client, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student.prompt(model, "Hello")
    monkeypatch.setenv("LLMKIT_SERVER_URL", student.url)
    monkeypatch.setenv("LLMKIT_TOKEN", hub.token_of("sam"))
    used = next(one for one in student.usage() if one.model_id == model)
    cells = [str(value) for value in used.model_dump().values()]
    told = []
    for more in ([], ["--csv"], ["--json"]):
        assert main(["usage", *more]) == 0
        told.append(capsys.readouterr().out)
    assert cells in [line.split() for line in told[0].splitlines()]
    assert ",".join(cells) in told[1].splitlines()
    assert used.model_dump() in json.loads(told[2])["usage"]


@pytest.mark.vllm
@pytest.mark.timeout(LOAD_SECONDS + 6 * START_SECONDS)
def test_the_demo_model_answers_a_student(teacher: Client, student: Client) -> None:
    teacher.configure("demo", **DEMO)
    try:
        teacher.load("demo", progress=False)
        pieces = list(student.stream("demo", QUESTION, max_tokens=50, temperature=0))
        assert "".join(pieces) == ANSWER
        assert len(pieces) > 1
        record = student.requests(1).recent[0]
        assert (record.user, record.model_id, record.outcome) == ("sam", "demo", "ok")
        assert record.usage is not None
        assert (record.usage.completion_tokens or 0) > 1
    finally:
        teacher.delete("demo", unload=True)


# -- from a kernel --------------------------------------------------------------------------------------------

BOTH = (
    "import llmkit\nshared, own = llmkit.connect(), llmkit.connect(shared=False)\n"
    "print(shared.place, own.place, shared.health().status, own.health().status, sep='|')\n"
)


def test_a_kernel_finds_the_service_and_the_own_registry_too(hub: Hub, model: str) -> None:
    with ServerKernel(hub.start_server("sam"), hub.token) as kernel:
        shared, own, *states = kernel.run(BOTH).split("|")
        assert shared == f"{hub.url}services/llmkit/ (shared)"
        assert own.endswith("/user/sam/")
        assert states == ["ok", "ok"]
        assert kernel.run(f"print(shared.prompt({model!r}, 'Hello'))") == ANSWER
        assert kernel.run("print(sorted(shared.permissions()))") == "['execute', 'read']"
        assert kernel.run("print(own.models())") != kernel.run("print(shared.models())")
        assert "Hub's administrators" not in kernel.run("%load_ext llmkit\n%llmkit")
        # A teacher's token is not a student's: the same scopes of the server, another user.
    with ServerKernel(hub.start_server("grace"), hub.token) as kernel:
        assert kernel.run("import llmkit\nprint(sorted(llmkit.connect().permissions()))") == (
            "['execute', 'read', 'write']"
        )
        (fetch,) = re.findall(r"^  (curl .*usage.*)$", PAGE, re.MULTILINE)
        fetch = f"subprocess.run(['sh', '-c', {fetch!r}], check=True, capture_output=True)"
        table = kernel.run(f"import subprocess\n_ = {fetch}\nprint(open('usage.csv').read())")
        assert f",sam,{model}," in table


# -- externally managed ---------------------------------------------------------------------------------------


def test_a_service_that_the_hub_does_not_start(tmp_path: Path) -> None:
    port = free_port()
    external = "_service.pop('command'); _service.pop('user'); _service['api_token'] = 'token-of-the-service'\n"
    external += "_service['timeout'] = 1\n"  # it is started after the Hub
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    with Hub(BEFORE + DOCUMENTED.replace("8105", str(port)) + AFTER + external) as hub:
        script = script.replace("8105", str(port)).replace("127.0.0.1:8081", f"127.0.0.1:{hub.hub_port}")
        script = script.replace("TOKEN=...", "TOKEN=token-of-the-service")
        script = script.replace("jupyter llmkit", "exec jupyter llmkit --allow-root --LLMKitApp.standby=off")
        environment = {
            **own_environment(),
            "HOME": str(tmp_path),
            "LLMKIT_STATE_DIR": str(tmp_path / "state"),
            "LLMKIT_RUN_DIR": str(hub.run_dir),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        }
        with (tmp_path / "log").open("wb") as log:
            service = subprocess.Popen(["bash", "-c", script], env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_for_service(hub)
            with person(hub, "sam") as student:
                assert student.health().status == "ok"
                assert student.permissions() == {"read", "execute"}
        finally:
            service.terminate()
            service.wait(START_SECONDS)
