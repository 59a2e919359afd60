from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.panel import transcript as module
from llmkit.panel.transcript import Transcript, Turn

PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def sent(transcript: Transcript) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    # As it goes over the wire, and as it was at that moment.
    transcript.send = lambda message: messages.append(json.loads(json.dumps(message)))
    return messages


@pytest.fixture
def transcript() -> Transcript:
    return Transcript()


def hello(transcript: Transcript, page: str = "one") -> None:
    transcript._greeted(None, {"type": "hello", "page": page}, None)


def test_only_what_is_new_is_sent(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    for _ in range(1000):
        transcript.append("token ")
    transcript.end("1000 tokens")
    assert [message["type"] for message in sent] == ["begin", *["append"] * 1000, "end"]
    assert [message["number"] for message in sent] == list(range(1, 1003))
    # The thousandth costs what the first did.
    assert all({**message, "number": 0} == {**sent[1], "number": 0} for message in sent[1:-1])
    assert transcript.turns[0].text == "token " * 1000


def test_what_waits_says_so_until_something_comes(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    for note in ("Waiting: place 2 in the queue.", "Waiting: place 2 in the queue.", "Waiting: place 1 in the queue."):
        transcript.wait(note)
    assert [message["note"] for message in sent[1:]] == [
        "Waiting: place 2 in the queue.",
        "Waiting: place 1 in the queue.",
    ]
    transcript.append("This.")
    transcript.wait("Waiting: place 1 in the queue.")  # told too late
    assert [message["type"] for message in sent] == ["begin", "wait", "wait", "append"]
    assert transcript.turns[0].note == ""


def test_nothing_of_it_is_in_the_widgets_state(transcript: Transcript) -> None:
    transcript.begin("demo", "a-private-question", [PICTURE])
    transcript.append("a-private-answer", "a-private-thought")
    transcript.end("private-note", tool_calls=[{"name": "private"}])
    state = json.dumps(transcript.get_state(), default=str)
    assert "private" not in state
    assert PICTURE not in state


def test_a_page_that_comes_later_gets_everything(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    transcript.begin("demo", "What?", [PICTURE])
    transcript.append("This.", "Hm.")
    transcript.end("2 tokens", tool_calls=[call])
    transcript.begin("other", "And?")
    transcript.append("Th")
    hello(transcript, "the-new-page")
    assert sent[-1]["page"] == "the-new-page"  # so that another page need not draw all of it again
    assert sent[-1]["number"] == len(sent)
    assert sent[-1]["turns"] == [
        {
            "model_id": "demo",
            "prompt": "What?",
            "images": [PICTURE],
            "text": "This.",
            "reasoning": "Hm.",
            "tool_calls": [call],
            "state": "done",
            "note": "2 tokens",
        },
        {
            "model_id": "other",
            "prompt": "And?",
            "images": [],
            "text": "Th",
            "reasoning": "",
            "tool_calls": [],
            "state": "streaming",
            "note": "",
        },
    ]
    count = len(sent)
    transcript._greeted(None, "nonsense", None)
    assert len(sent) == count


def test_text_and_thoughts_are_kept_apart(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    transcript.append(reasoning="Let me see.")
    transcript.append("It is")
    transcript.append(" this.", " Yes.")
    transcript.append()
    assert [{key for key in message if key in {"text", "reasoning"}} for message in sent[1:]] == [
        {"reasoning"},
        {"text"},
        {"text", "reasoning"},
    ]
    assert (transcript.turns[0].text, transcript.turns[0].reasoning) == ("It is this.", "Let me see. Yes.")


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_an_answer_ends_in_three_ways(transcript: Transcript, sent: list[dict[str, Any]], state: Any) -> None:
    transcript.begin("demo", "What?")
    transcript.end("So it ended.", state)
    assert (transcript.turns[0].state, transcript.turns[0].note) == (state, "So it ended.")
    assert (sent[-1]["state"], sent[-1]["note"]) == (state, "So it ended.")


def test_what_comes_too_late_changes_nothing(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    transcript.append("This")
    transcript.end("done")
    count = len(sent)
    transcript.append(" and that")
    transcript.end("done again", "failed")
    transcript.clear()
    transcript.append("a piece of what is not shown any more")
    assert len(sent) == count + 1
    assert transcript.turns == []


def test_a_kept_conversation_takes_the_place_of_all(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    transcript.begin("demo", "What?")
    kept = [Turn("demo", str(number), text="Yes.", state="done") for number in range(150)]
    transcript.show(kept)
    assert transcript.turns == kept[50:]
    assert sent[-1]["type"] == "all"
    assert [turn["prompt"] for turn in sent[-1]["turns"]] == [str(number) for number in range(50, 150)]
    assert "page" not in sent[-1]  # for every page
    kept[-1].text = "No."
    assert transcript.turns[-1].text == "Yes."


def test_it_is_bounded_and_can_be_emptied(transcript: Transcript, sent: list[dict[str, Any]]) -> None:
    for number in range(150):
        transcript.begin("demo", str(number))
    assert len(transcript.turns) == 100
    assert sent[-1]["kept"] == 100
    transcript.clear()
    assert transcript.turns == []
    assert sent[-1] == {"type": "all", "number": 151, "turns": []}


def test_the_module_is_one_text_for_all_widgets() -> None:
    one, other = Transcript(), Transcript()
    assert one._esm is other._esm
    assert one._esm.count("export default") == 1


def test_what_others_wrote_is_unchanged_and_its_licenses_are_there() -> None:
    vendor: Path = module.MARKDOWN_IT.parent
    digest = hashlib.sha256(module.MARKDOWN_IT.read_bytes()).hexdigest()
    readme = (vendor / "README.md").read_text()
    assert digest in readme
    assert module.MARKDOWN_IT.name in readme
    for name in ("markdown-it", "entities", "linkify-it", "mdurl", "punycode.js", "uc.micro"):
        assert "Copyright" in (vendor / f"{name}.LICENSE").read_text()
