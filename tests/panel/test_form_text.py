from __future__ import annotations

import html
import re
from typing import Any

import pytest

from llmkit.panel import form_text
from llmkit.schemas import LoadPlan, MemoryEstimate

GIB = 1 << 30


def plan(estimate: dict[str, Any] | None, **more: Any) -> LoadPlan:
    made = MemoryEstimate(**{"device": "gpu", **estimate}) if estimate is not None else None
    return LoadPlan(model_id="m", config_id="c", estimate=made, **{"fits": True, **more})


def words(line: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", line))


PARTS = {"weights_bytes": int(2.1 * GIB), "kv_cache_bytes": GIB, "overhead_bytes": 100 << 20, "total_bytes": 3 * GIB}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (plan(None), ""),
        (
            plan(PARTS, free_bytes=5 * GIB),
            "Will take about 3.0 GiB of GPU memory (weights 2.1 GiB, KV cache 1.0 GiB, rest 100 MiB); 5.0 GiB free.",
        ),
        (
            plan({"device": "cpu", "total_bytes": GIB, "measured": True}),
            "Will take 1.0 GiB of RAM, as it did before.",
        ),
        (
            plan({"total_bytes": 4 * GIB, "device_count": 2, "elastic": True}, fits=None),
            "Takes what it finds free, at least about 4.0 GiB of GPU memory on 2 GPUs together.",
        ),
        (
            plan({"total_bytes": GIB}, free_bytes=1, evict=["a", "b", "c"]),
            "Will take about 1.0 GiB of GPU memory; 1 B free. To make room, a, b and c would be unloaded first.",
        ),
        (
            plan({"total_bytes": GIB}, fits=False, reason="No GPU is large enough."),
            "Will take about 1.0 GiB of GPU memory. It does not fit. No GPU is large enough.",
        ),
        (
            plan({"reason": "the model is not on this machine yet"}, fits=None),
            "How much GPU memory it will take is not known: the model is not on this machine yet.",
        ),
        (plan({}, fits=None), "How much GPU memory it will take is not known."),
    ],
)
def test_what_a_load_takes_is_said_in_a_line(told: LoadPlan, said: str) -> None:
    assert words(form_text.memory_line(told)) == said


def test_everything_is_escaped() -> None:
    evil = "<img src=x>"
    made = [
        form_text.memory_line(plan({"total_bytes": 1}, evict=[evil])),
        form_text.memory_line(plan({"total_bytes": 1}, fits=False, reason=evil)),
        form_text.memory_line(plan({"reason": evil}, fits=None)),
        form_text.field_problem(evil),
        form_text.editing(evil),
        form_text.copy_of(evil, loses_key=True),
    ]
    for each in made:
        assert "<img" not in each
        assert "&lt;img" in each
