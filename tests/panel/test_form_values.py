from __future__ import annotations

from typing import Any

import pytest

from llmkit.panel.form_values import ENGINE, GENERATION, OWN, gather, place_of, spread, suggest_id

TABLE = {"dtype": "engine", "max_model_len": "engine", "seed": "generation", "temperature": "generation"}


@pytest.mark.parametrize(
    "model_kwargs",
    [
        {},
        {"dtype": "auto", "temperature": 0.5, "seed": 1},
        {"engine": {"dtype": "auto", "seed": 1}, "generation": {"seed": 2}},
        {"engine": {"seed": 1}, "seed": 2, "dtype": "auto"},
        {"engine": {"unknown": {"a": [1]}}, "unknown_too": None},
        {"api_key": {"secret": True, "set_at": "now"}},
    ],
)
def test_a_configuration_comes_back_as_it_was(model_kwargs: dict[str, Any]) -> None:
    told = {
        "model_id": "m",
        "model_name": "n",
        "model_kwargs": model_kwargs,
        "idle_ttl": 0.0,
        "prices": {"input": 1.0, "output": 2.0, "currency": "EUR"},
    }
    server = {"config_id": "c", "model_type": "t", "declared": True}
    assert gather(spread({**told, **server}, TABLE), TABLE, model_kwargs) == told


def test_what_is_new_stands_where_the_server_looks_for_it() -> None:
    values = {(ENGINE, "dtype"): "auto", (ENGINE, "seed"): 1, (GENERATION, "seed"): 2, (OWN, "model_id"): "m"}
    assert gather(values, TABLE) == {
        "model_id": "m",
        "model_kwargs": {"dtype": "auto", "engine": {"seed": 1}, "seed": 2},
    }
    nested = gather(values, TABLE, {"engine": {"max_model_len": 8}})["model_kwargs"]
    assert nested == {"engine": {"dtype": "auto", "seed": 1}, "seed": 2}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model_id", (OWN, "model_id")),
        ("model_kwargs", (OWN, "model_kwargs")),
        ("model_kwargs.dtype", (ENGINE, "dtype")),
        ("model_kwargs.seed", (GENERATION, "seed")),
        ("model_kwargs.engine.seed", (ENGINE, "seed")),
        ("model_kwargs.engine", (ENGINE, "engine")),
        ("model_kwargs.max_model_len.int", (ENGINE, "max_model_len")),
        ("prices.input", (OWN, "prices.input")),
        ("", (OWN, "")),
    ],
)
def test_a_path_of_the_server_points_to_a_place(path: str, place: tuple[str, str]) -> None:
    assert place_of(path, TABLE) == place


@pytest.mark.parametrize(
    ("model_id", "taken", "free"),
    [
        ("demo", ["demo"], "demo-2"),
        ("demo-2", ["demo", "demo-2"], "demo-3"),
        ("demo-7", [], "demo-2"),
        ("a" * 128, [], f"{'a' * 120}-2"),
    ],
)
def test_a_copy_gets_a_name_that_is_free(model_id: str, taken: list[str], free: str) -> None:
    assert suggest_id(model_id, taken) == free
