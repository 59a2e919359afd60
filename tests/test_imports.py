"""Imports go one way, and cost little."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import REPOSITORY

import llmkit

LEAVES = {"llmkit.schemas", "llmkit.tool_keys", "llmkit.errors", "llmkit._version", "llmkit.demo"}

# Lower numbers are imported by higher ones, never the other way round.
SERVER_CHAIN = {
    "llmkit.process": 1,
    "llmkit.engines": 2,
    "llmkit.inference": 3,
    "llmkit.registry": 4,
    "jupyter_server_ext": 5,
}
KERNEL_CHAIN = {"llmkit.client": 1, "llmkit.panel": 2, "llmkit.magics": 2, "llmkit.cli": 2, "llmkit.__main__": 3}

# They run as processes of their own; nobody imports them.
PROGRAMS = {"llmkit.demo.__main__", "llmkit.demo.train"}
ENGINE_PROGRAMS = {
    f"llmkit.engines.{name}"
    for name in ("vllm.launch", "vllm.hub", "vllm.standby", "vllm.warm", "vllm.describe", "ray_application")
}

HEAVY = {
    "aiohttp",
    "anywidget",
    "httpx",
    "ipywidgets",
    "jupyter_server",
    "openai",
    "pydantic",
    "torch",
    "tornado",
    "vllm",
}
IMPORT_SECONDS = {"llmkit": 0.15, "jupyter_server_ext": 0.1}


@dataclass(frozen=True)
class Import:
    """One import: which module imports what, and where."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Give every module of the two packages by its dotted name."""
    found = {}
    for package in ("llmkit", "jupyter_server_ext"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str) -> Iterator[Import]:
    """Yield every import of a module, those inside functions and for type checkers too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                home = ".".join([*base, *filter(None, [home])])
            for alias in node.names:
                yield Import(module, resolve(home, alias.name), node.lineno)


def resolve(home: str, name: str) -> str:
    """Give the module that ``from home import name`` gets its name from."""
    if f"{home}.{name}" in MODULES:
        return f"{home}.{name}"
    if home == "llmkit" and name in llmkit._HOMES:
        return llmkit._HOMES[name]
    return home


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def within(module: str, *packages: str) -> bool:
    """Say whether a module is one of the packages, or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def ours(module: str) -> bool:
    return within(module, "llmkit", "jupyter_server_ext")


def rank(module: str, chain: dict[str, int]) -> int | None:
    """Give the place of a module in a chain, or None."""
    return next((place for package, place in chain.items() if within(module, package)), None)


def wrong(imports: Iterator[Import]) -> list[str]:
    return sorted(map(str, imports))


def test_every_module_has_a_place_in_the_rules() -> None:
    known = {*LEAVES, *PROGRAMS, *SERVER_CHAIN, *KERNEL_CHAIN}
    assert [m for m in MODULES if m != "llmkit" and not within(m, *known)] == []


def test_llmkit_never_imports_the_extension() -> None:
    assert wrong(i for i in IMPORTS if within(i.importer, "llmkit") and within(i.imported, "jupyter_server_ext")) == []


def test_only_the_extension_imports_jupyter_server_and_tornado_web() -> None:
    assert (
        wrong(
            i
            for i in IMPORTS
            if within(i.imported, "jupyter_server", "tornado.web") and not within(i.importer, "jupyter_server_ext")
        )
        == []
    )


def test_only_programs_of_their_own_process_import_vllm_and_ray() -> None:
    heavy = ("vllm", "ray", "torch", "transformers")
    assert (
        wrong(i for i in IMPORTS if within(i.imported, *heavy) and i.importer not in ENGINE_PROGRAMS | PROGRAMS) == []
    )


def test_nobody_but_another_imports_a_program() -> None:
    programs = ENGINE_PROGRAMS | PROGRAMS
    assert wrong(i for i in IMPORTS if i.imported in programs and i.importer not in programs) == []


def test_leaves_import_only_leaves() -> None:
    assert wrong(i for i in IMPORTS if i.importer in LEAVES and ours(i.imported) and i.imported not in LEAVES) == []


@pytest.mark.parametrize("chain", [SERVER_CHAIN, KERNEL_CHAIN], ids=["server", "kernel"])
def test_a_chain_imports_itself_downwards_and_leaves(chain: dict[str, int]) -> None:
    def allowed(found: Import) -> bool:
        here, there = rank(found.importer, chain), rank(found.imported, chain)
        if there is not None and here is not None:
            return there < here or top(found.importer) == top(found.imported)
        return found.imported in LEAVES or found.imported == "llmkit"

    def top(module: str) -> str:
        return next(package for package in chain if within(module, package))

    assert (
        wrong(i for i in IMPORTS if rank(i.importer, chain) is not None and ours(i.imported) and not allowed(i)) == []
    )


def loaded_by(statement: str) -> set[str]:
    """Give the top-level packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("package", ["llmkit", "jupyter_server_ext"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert loaded_by(f"import {package}") & HEAVY == set()


@pytest.mark.alone
@pytest.mark.parametrize("package", ["llmkit", "jupyter_server_ext"])
def test_importing_a_package_is_quick(package: str) -> None:
    code = f"import time; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, timeout=60, check=True).stdout for _ in range(5)]
    seconds = min(map(float, runs))
    print(f"import {package}: {seconds:.3f} s")
    assert seconds <= IMPORT_SECONDS[package]


def test_the_public_names_are_these_for_people_and_for_type_checkers() -> None:
    # Who removes or renames one breaks the notebooks of others: that is said in the changelog.
    public = {"AsyncClient", "Client", "LLMKitError", "__version__", "connect", "panel", "start"}
    assert set(llmkit.__all__) == public
    assert {name for name in llmkit._HOMES if name in llmkit.__all__} == public - {"__version__"}
    (for_checkers,) = [node for node in ast.parse(MODULES["llmkit"].read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in for_checkers.body if isinstance(node, ast.ImportFrom)]
    told = {alias.name: node.module for node in imports for alias in node.names}
    assert {name: resolve("llmkit", name) for name in told} == told
    assert told.keys() == public - {"__version__"}


@pytest.mark.parametrize("name", llmkit.__all__)
def test_public_names_resolve_and_are_described(name: str) -> None:
    public = getattr(llmkit, name)
    assert name in dir(llmkit)
    assert isinstance(public, str) or (callable(public) and public.__doc__)


def test_a_public_function_survives_the_import_of_the_module_that_has_its_name() -> None:
    loaded_by("import llmkit; llmkit.panel; import llmkit.panel; assert callable(llmkit.panel)")


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = llmkit.nonsense
