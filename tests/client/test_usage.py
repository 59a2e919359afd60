"""Usage as a client shows it; who may see what is tested with a real Hub in `test_hub_service`."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.client import Client, Usage, connect
from llmkit.errors import NotSupported

DAYS = [
    {"day": "2026-11-24", "user": "ada", "model_id": "gpt", "requests": 3, "tokens": 40},
    {"day": "2026-11-25", "user": "<b>", "model_id": "gpt", "requests": 1, "tokens": 7},
]
TOLD = {
    "usage": DAYS,
    "limits": {"requests_per_day": 20, "tokens_per_day": 200_000},
    "left": {"requests_per_day": 17, "tokens_per_day": 199_960},
}


@pytest.fixture
def usage(fake: Any) -> Usage:
    fake.replies["GET", "/llm/usage/"] = (200, TOLD)
    with connect(fake.url) as client:
        return client.usage()


def test_it_is_a_list_that_shows_as_a_table(usage: Usage) -> None:
    assert [one.model_dump() for one in usage] == DAYS
    assert usage.left["requests_per_day"] == 17
    lines = repr(usage).splitlines()
    assert lines[0].split() == ["day", "user", "model_id", "requests", "tokens"]
    assert lines[-1] == "Left: 17 of 20 requests a day, 199,960 of 200,000 tokens a day"
    html = usage._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert repr(Usage()) == "Nothing was asked yet."


def test_it_becomes_a_table_of_pandas(usage: Usage) -> None:
    frame = usage.to_frame()
    assert frame.to_dict("records") == DAYS
    assert list(Usage().to_frame().columns) == list(frame.columns)


def test_a_server_of_ones_own_says_that_it_keeps_none(client: Client) -> None:
    with pytest.raises(NotSupported, match="keeps no usage"):
        client.usage()
