"""What ``python -m build`` makes, installed and used in an environment of its own: one without vLLM.

Nothing is downloaded. The environment has what is built here, and links to those packages of the tests' own environment
that llmkit says it needs, and that these need; what it does not say is not there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from mock_upstream import ANSWER, MockUpstream
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import DEMO, QUESTION, REPOSITORY, JupyterServer, own_environment, wait_until
from test_docs import dead_links

from llmkit import __version__
from llmkit.client import Client, connect
from llmkit.errors import DoesNotFit, EngineNotInstalled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

EXAMPLE_ENGINE = REPOSITORY / "tests" / "example_engine"
SECONDS = 180
NOT_IMPORTED = r"__main__|ray_application|vllm\.(launch|hub|standby|warm)"
"""Programs."""


def run(*command: str | Path) -> str:
    """Run a program away from the repository and its modules, and give what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd="/",
        env={name: value for name, value in own_environment().items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project: Path, folder: Path, *options: str) -> None:
    """Build a project with what builds it already there: nothing is downloaded."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", *options, project)


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder), "platbase": str(self.folder)}))

    def run(self, *arguments: str) -> str:
        return run(self.python, *arguments)

    def pip(self, *arguments: str | Path) -> str:
        return run(sys.executable, "-m", "pip", f"--python={self.python}", *arguments)

    def link_what_is_needed(self) -> None:
        """Link every distribution that the installed ones need, directly or not."""
        have = {canonicalize_name(one.name): one for one in metadata.distributions(path=[str(self.packages)])}
        linked: set[str] = set()
        todo = [(requirement, "") for one in have.values() for requirement in one.requires or ()]
        seen = set()
        while todo:
            text, extra = todo.pop()
            needed = Requirement(text)
            if (text, extra) in seen or (needed.marker and not needed.marker.evaluate({"extra": extra})):
                continue
            seen.add((text, extra))
            name = canonicalize_name(needed.name)
            found = have.get(name) or metadata.distribution(name)
            todo += [(one, wanted) for one in found.requires or () for wanted in ("", *needed.extras)]
            if name not in have:
                linked |= {str(found.locate_file(file.parts[0])) for file in found.files or () if file.parts[0] != ".."}
        for place in map(Path, linked):
            if place.name != "__pycache__":
                (self.packages / place.name).symlink_to(place)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a source distribution, and the wheel that was built from that."""
    folder = tmp_path_factory.mktemp("built")
    build(REPOSITORY, folder)
    return folder


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Give an environment with llmkit, the model type of a third party, and what both need."""
    made = Environment(tmp_path_factory.mktemp("clean"))
    wheels = tmp_path_factory.mktemp("wheels")
    build(EXAMPLE_ENGINE, wheels, "--wheel")
    run(sys.executable, "-m", "venv", "--without-pip", made.folder)
    made.pip("install", "--quiet", "--no-index", "--no-deps", *built.glob("*.whl"), *wheels.glob("*.whl"))
    made.link_what_is_needed()
    return made


def test_a_source_distribution_and_a_wheel_carry_the_version(built: Path) -> None:
    names = [f"llmkit-{__version__}-py3-none-any.whl", f"llmkit-{__version__}.tar.gz"]
    assert sorted(path.name for path in built.iterdir()) == names


def test_the_version_is_written_down_once() -> None:
    files = [REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile"]
    for package in ("llmkit", "jupyter_server_ext"):
        files += (REPOSITORY / package).rglob("*.py")
    written = re.compile(rf"""["']v?{re.escape(__version__)}["']""")
    holders = [file.name for file in files if written.search(file.read_text(encoding="utf-8"))]
    assert holders == ["_version.py"]


def test_the_source_distribution_has_all_that_its_pages_link_to(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert (root / "README.md").is_file()
    assert dead_links(root) == []


def test_the_wheel_has_what_is_no_module_and_not_what_makes_the_demo_model(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    of_repository = {
        str(path.relative_to(REPOSITORY))
        for package in ("llmkit", "jupyter_server_ext")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in of_repository - names if "jupyter-config" not in name} == {
        f"llmkit/demo/{name}" for name in ("train.py", "questions.py", "questions.toml", "capitals.csv")
    }
    assert not [name for name in names if name.startswith(("tests/", "notebooks/"))]


def test_what_llmkit_says_it_needs_is_enough(clean: Environment) -> None:
    clean.pip("check")
    code = f"""
import importlib, importlib.util, pkgutil, re, sys
assert importlib.util.find_spec("vllm") is importlib.util.find_spec("torch") is None
for package in ("llmkit", "jupyter_server_ext"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{{package}}."):
        if not re.search({NOT_IMPORTED!r}, found.name):
            importlib.import_module(found.name)
print(sum(name.startswith(("llmkit.", "jupyter_server_ext.")) for name in sys.modules))
print(sys.modules["llmkit"].__file__)
"""
    count, file = clean.run("-c", code).split()
    assert int(count) > 100
    assert Path(file).is_relative_to(clean.folder)


def test_the_command_is_there_and_the_extension_enabled(clean: Environment) -> None:
    assert run(clean.python.parent / "llmkit", "--version") == f"llmkit {__version__}\n"
    listed = clean.run("-m", "jupyter_server.extension.serverextension", "list", "--sys-prefix")
    assert "jupyter_server_ext enabled" in re.sub(r"\x1b\[\d*m", "", listed)


def test_a_type_checker_takes_the_types_of_what_is_installed(clean: Environment, tmp_path: Path) -> None:
    # Modules are looked for and not read, which is quick; of one without py.typed the checker complains.
    checker = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--python-executable={clean.python}"]
    checker += ["--follow-imports=skip", f"--cache-dir={tmp_path}", "-c"]
    run(*checker, "import llmkit.client, llmkit.engines.base")
    with pytest.raises(AssertionError, match=r"ipywidgets.*py\.typed"):
        run(*checker, "import ipywidgets")


@pytest.fixture(scope="module")
def server(clean: Environment) -> Iterator[JupyterServer]:
    with MockUpstream() as upstream:
        environment = {"PYTHONPATH": "", "OPENAI_BASE_URL": upstream.base_url}
        with JupyterServer("llmkit", python=clean.python, env=environment) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: JupyterServer) -> Iterator[Client]:
    with connect(server.url, server.token) as connected:
        yield connected


def test_without_vllm_the_rest_works_and_says_what_is_missing(client: Client, server: JupyterServer) -> None:
    assert server.request("GET", "llm/health").json()["version"] == __version__
    assert server.request("GET", "llm/openapi.json").json()["info"]["version"] == __version__
    client.configure("remote", "gpt-3", "openai")
    client.load("remote", progress=False)
    assert str(client.prompt("remote", QUESTION)) == ANSWER
    client.configure("local", **DEMO)
    with pytest.raises(EngineNotInstalled, match="vLLM is not installed") as caught:
        client.load("local", progress=False)
    assert "pip install" in str(caught.value.hint)


def test_a_model_type_of_a_third_party_lives_like_any_other(client: Client) -> None:
    by_name = {one.name: one for one in client.model_types()}
    assert sorted(by_name) == ["openai", "parrot", "vllm"]
    with pytest.raises(DoesNotFit, match=r"`parrot` models; did you mean `times`\?"):
        client.configure("polly", "plain", "parrot", {"time": 2})
    with pytest.raises(DoesNotFit, match="must be one of plain, loud"):
        client.configure("polly", "shrill", "parrot")

    client.configure("polly", "loud", "parrot", {"times": 2, "temperature": 0})
    assert client.plan("polly").fits
    assert client.load("polly", progress=False).memory.pss_bytes
    assert client.logs("polly") == ["A loud parrot listens."]

    assert str(client.prompt("polly", "hello there")) == "HELLO THERE HELLO THERE"
    pieces = list(client.stream("polly", "hello there"))
    assert ("".join(pieces), len(pieces) > 1) == ("HELLO THERE HELLO THERE", True)
    messages = [{"role": "user", "content": "hello"}]
    with client.openai() as openai:
        reply = openai.chat.completions.create(model="polly", messages=messages)
    assert reply.choices[0].message.content == "HELLO HELLO"

    freed = client.unload("polly")
    assert freed.verified
    assert freed.pss_bytes
    assert client.model("polly").status == "unloaded"


def test_the_end_of_its_program_is_noticed_and_told_in_its_words(client: Client, server: JupyterServer) -> None:
    client.configure("lost", "plain", "parrot")
    client.load("lost", progress=False)
    (program,) = [one for one in server.engine_processes() if one.cmdline()[1:3] == ["-m", "llmkit_parrot.program"]]
    program.kill()
    wait_until(lambda: client.model("lost").status == "failed", "the failure")
    error = client.model("lost").error
    assert error is not None
    assert error.message == "The parrot flew away."
