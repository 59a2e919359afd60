"""Every public name says what it does with an example, and every example is run as a user would run it.

The server is real. Its ``vllm`` is a program that answers each prompt with the capital of France, so that nobody has
to have vLLM; ``gpt`` is a model of the mock upstream. Examples may await and have magics, as in a notebook.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import doctest
import inspect
import io
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import pytest
from fake_engine_type import PLUGIN
from IPython.core.interactiveshell import InteractiveShell
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer

import llmkit
import llmkit.client
from llmkit import magics
from llmkit.client import AsyncAnswerStream, AsyncClient, Client, connect, conversations, results, transfer
from llmkit.panel import Panel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

VLLM = f"""
from fake_engine_type import FakeVLLMEngineType
from llmkit.engines.vllm import engine
engine.VLLMEngineType = FakeVLLMEngineType("--answer={ANSWER}", "--tokens-per-second=100")
"""
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SAMPLES = {
    "demo": ("llmkit/demo", "vllm", {}),
    "gpt": ("gpt-4o-mini", "openai", {"api_key": "env:OPENAI_API_KEY", "temperature": 0}),
}
"""What the examples may take for granted: these models, loaded, and ``client``."""


class Name(NamedTuple):
    """A public name, its docstring, and the module that it stands in."""

    name: str
    doc: str
    module: ModuleType
    is_async: bool


def names() -> Iterator[Name]:
    """Give every public name; of classes their methods and properties, too, also those of their bases in llmkit."""
    yield of("llmkit", llmkit, llmkit)
    for extension in (magics.load_ipython_extension, magics.unload_ipython_extension):
        yield of(f"llmkit.magics.{extension.__name__}", extension, magics)
    classes = {getattr(llmkit.client, name) for name in llmkit.client.__all__}
    classes |= {results.Provenance, transfer.Imported, conversations.KeptConversations, llmkit.LLMKitError}
    for name in llmkit.__all__:
        found = getattr(llmkit, name)
        if name == "panel":
            yield of("llmkit.panel", found.panel, found)
        elif inspect.isfunction(found):
            yield of(f"llmkit.{name}", found, sys.modules[found.__module__])
        elif inspect.isclass(found):
            classes.add(found)
    for found in sorted((one for one in classes if inspect.isclass(one)), key=lambda one: one.__qualname__):
        module = sys.modules[found.__module__]
        is_async = found in (AsyncClient, AsyncAnswerStream)
        yield of(found.__qualname__, found, module, is_async=is_async)
        if found is llmkit.LLMKitError:
            continue  # its attributes are fields, and its example shows them
        for name, member in sorted(members(found).items()):
            yield of(f"{found.__qualname__}.{name}", member, module, is_async=is_async)


def of(name: str, found: Any, module: ModuleType, *, is_async: bool = False) -> Name:
    return Name(name, inspect.cleandoc(found.__doc__ or ""), module, is_async)


def members(kind: type) -> dict[str, Any]:
    """Give the public methods and properties that are made in the client."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("llmkit.client."):
            for name, member in vars(base).items():
                plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if not name.startswith(("_", "model_post_init")) and (
                    inspect.isfunction(plain) or isinstance(plain, property)
                ):
                    found[name] = plain
    return found


NAMES = list(names())


def test_every_public_name_has_a_docstring_with_an_example() -> None:
    assert len(NAMES) > 100
    lacking = [one.name for one in NAMES if not one.doc or "Examples\n--------\n>>> " not in one.doc]
    assert lacking == []
    assert [one.name for one in NAMES if "+SKIP" in one.doc] == []


@pytest.fixture(scope="module")
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def documented(upstream: MockUpstream) -> Iterator[JupyterServer]:
    """Give a server whose model type ``vllm`` needs no vLLM."""
    path = os.pathsep.join(filter(None, (*PLUGIN["PYTHONPATH"].split(os.pathsep)[:2], os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "OPENAI_BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-of-the-server"}
    made = JupyterServer("server", env=env)
    (made.folder / "config" / "jupyter_server_config.py").write_text(VLLM)
    with made as running:
        yield running


@pytest.fixture
def client(documented: JupyterServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """Give a client of a server with both models loaded and no conversations; in a folder of its own."""
    monkeypatch.setenv("LLMKIT_SERVER_URL", documented.url)
    monkeypatch.setenv("LLMKIT_TOKEN", documented.token)
    monkeypatch.chdir(tmp_path)

    def ask(prompt: str) -> str:
        print(f"{prompt}········")
        return "sk-given"

    monkeypatch.setattr("getpass.getpass", ask)
    with connect() as connected:
        for kept in connected.conversations().conversations:
            connected.delete_conversation(kept.conversation_id)
        stored = {one.model_id: one.model_kwargs for one in connected.configurations()}
        if stored != {model_id: kwargs for model_id, (_, _, kwargs) in SAMPLES.items()}:
            for model_id in stored:
                connected.delete(model_id, unload=True)
        for model_id, sample in SAMPLES.items():
            connected.configure(model_id, *sample)
            connected.load(model_id, progress=False)
        yield connected


def run(examples: list[doctest.Example], names: dict[str, Any], shell: InteractiveShell) -> Iterator[str]:
    """Run examples as a notebook runs cells, and give what of their output was not as it is said."""
    checker = doctest.OutputChecker()
    with asyncio.Runner() as runner:
        for example in examples:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                try:
                    value = eval(read(example.source, shell), names)  # noqa: S307  # our own docstrings
                    if inspect.iscoroutine(value):
                        runner.run(value)
                except Exception as error:  # noqa: BLE001  # one that is said is right
                    if example.exc_msg is None:
                        traceback.print_exc(file=shown)
                    else:
                        shown.write("".join(traceback.format_exception_only(error)))
            got, want = shown.getvalue(), example.exc_msg or example.want
            if not checker.check_output(want, got, OPTIONS | sum(example.options)):
                yield f"{example.source}gave\n{got}instead of\n{want}"


def read(source: str, shell: InteractiveShell) -> CodeType:
    plain = shell.transform_cell(source)
    return compile(plain, "<docstring>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("found", NAMES, ids=lambda one: one.name)
def test_the_example_does_what_it_says(
    found: Name, client: Client, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "displayhook", sys.__displayhook__)
    asking = client.as_async() if found.is_async else client
    known = {**vars(found.module), "llmkit": llmkit, "client": asking, "asyncio": asyncio, "get_ipython": lambda: shell}
    try:
        wrong = list(run(doctest.DocTestParser().get_examples(found.doc), known, shell))
        assert not wrong, "\n".join(wrong)
    finally:
        made = known.get("client")
        if isinstance(made, Client):
            made.close()
        shown = vars(builtins).pop("_", None)
        if isinstance(shown, Panel):
            shown.close()
