from __future__ import annotations

import json
from typing import Any

import pytest

from llmkit.panel.transcript import Transcript


@pytest.fixture
def sent(transcript: Transcript) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    transcript.send = messages.append
    return messages


@pytest.fixture
def transcript() -> Transcript:
    return Transcript()


def test_only_what_is_new_is_sent(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    sizes = []
    for _ in range(1000):
        transcript.append("token ")
        sizes.append(len(json.dumps(sent[-1])))
    transcript.end("1000 tokens")
    assert len(set(sizes)) == 1  # the thousandth costs what the first did
    assert [message["type"] for message in sent] == ["begin", *["append"] * 1000, "end"]
    assert transcript.turns[0].text == "token " * 1000


def test_nothing_of_it_is_in_the_widgets_state(transcript: Transcript) -> None:
    transcript.begin("demo", "a-private-question")
    transcript.append("a-private-answer")
    assert "private" not in json.dumps(transcript.get_state(), default=str)


def test_a_page_that_comes_later_gets_everything(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    transcript.append("This.")
    transcript.end("done")
    transcript.begin("demo", "And?")
    transcript.append("Th")
    transcript._greeted(None, {"type": "hello"}, None)
    turns = sent[-1]["turns"]
    assert [(turn["prompt"], turn["text"], turn["state"]) for turn in turns] == [
        ("What?", "This.", "done"),
        ("And?", "Th", "streaming"),
    ]
    transcript._greeted(None, "nonsense", None)
    assert sent[-1]["turns"] is turns


def test_it_is_bounded_and_can_be_emptied(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    for number in range(150):
        transcript.begin("demo", str(number))
    assert len(transcript.turns) == 100
    transcript.clear()
    assert transcript.turns == []
    assert sent[-1] == {"type": "all", "turns": []}
