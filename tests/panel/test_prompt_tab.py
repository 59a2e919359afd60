"""The tab *Prompt*: asking, stopping, and conversations that the server keeps."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream
from support import wait_until

from llmkit.client import Client
from llmkit.errors import DiskFull, TimedOut
from llmkit.panel import Panel
from llmkit.panel.comparison import measured, note
from llmkit.panel.conversation import FIRST_QUESTION
from llmkit.panel.desk import Desk
from llmkit.panel.lane import Lane
from llmkit.panel.prompt_tab import PromptTab
from llmkit.panel.widgets import Kit
from llmkit.schemas import ConversationRequest, Cost, Snapshot

EVERYTHING = frozenset({"read", "execute", "write"})


def hidden(widget: Any) -> bool:
    return "llmkit-hidden" in widget._dom_classes


@pytest.fixture
def asking(panel: Panel, configure: Callable[[str], None], client: Client) -> Any:
    """Give the prompt tab with a loaded model chosen."""
    configure("ask")
    client.load("ask", progress=False)
    assert panel.prompt is not None
    wait_until(lambda: "ask" in panel.prompt._loaded, "the model", 5)  # type: ignore[union-attr]
    assert panel._lane.settle(5)
    panel.prompt.choose("ask")
    return panel.prompt


def wait_for_turn(prompt: Any, state: str) -> Any:
    wait_until(lambda: prompt.transcript.turns and prompt.transcript.turns[-1].state == state, f"a turn {state}", 5)
    assert prompt._desk.lane.settle(5)
    return prompt.transcript.turns[-1]


def test_an_answer_streams_in_with_its_figures(asking: Any, upstream: MockUpstream) -> None:
    asking.prompt.value = "What is the capital of France?"
    asking.system.value = " Be brief. "
    asking.options["temperature"].switch.value = True
    asking.options["temperature"].control.value = 0.25
    asking.send.click()
    turn = wait_for_turn(asking, "done")
    assert (turn.model_id, turn.prompt, turn.text) == ("ask", "What is the capital of France?", ANSWER)
    assert "7 tokens" in turn.note
    assert "tokens/s" in turn.note
    assert "first token after" in turn.note
    body = upstream.requests[-1][2]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0.25
    assert "max_tokens" not in body
    assert asking.prompt.value == ""
    assert not asking.send.disabled


def test_an_option_can_be_set_only_when_it_is_on(asking: Any) -> None:
    assert asking.options["max_tokens"].control.disabled
    asking.options["max_tokens"].switch.value = True
    assert asking._desk.lane.settle(5)
    assert not asking.options["max_tokens"].control.disabled
    assert asking.options["max_tokens"].given == {"max_tokens": 256}


def test_without_a_loaded_model_nothing_can_be_sent(client: Client, lane: Lane) -> None:
    prompt = PromptTab(Desk(client, lane, Kit(), EVERYTHING, *[print] * 5))
    assert prompt.send.disabled
    assert not hidden(prompt._no_model)
    prompt._on_send()
    assert lane.settle(5)
    assert prompt.transcript.turns == []


def test_the_first_model_that_is_loaded_is_chosen_without_a_click(client: Client, lane: Lane) -> None:
    prompt = PromptTab(Desk(client, lane, Kit(), EVERYTHING, *[print] * 5))
    models = [
        {"model_id": name, "config_id": name, "model_name": "n", "model_type": "t", "status": status}
        for name, status in (("a", "unloaded"), ("b", "loaded"), ("c", "loaded"))
    ]
    prompt.update(Snapshot.model_validate({"epoch": "e", "revision": 1, "models": models}))
    assert (prompt.model.options, prompt.model.value, prompt.send.disabled) == ((("b", "b"), ("c", "c")), "b", False)
    prompt.update(Snapshot(epoch="e", revision=2, models=[]))
    assert (prompt.model.value, prompt.send.disabled) == (None, True)


def test_an_empty_prompt_is_not_sent(asking: Any) -> None:
    asking.prompt.value = "  \n"
    asking.send.click()
    assert asking._desk.lane.settle(5)
    assert asking.transcript.turns == []


@pytest.fixture
def endless(upstream: MockUpstream) -> MockUpstream:
    upstream.never_end("la ", 0.01)
    return upstream


def test_stop_ends_the_answer_here_and_at_the_engine(asking: Any, endless: MockUpstream) -> None:
    asking.prompt.value = "Sing"
    asking.send.click()
    wait_until(lambda: asking.transcript.turns and "la la" in asking.transcript.turns[-1].text, "the song", 5)
    assert asking.send.disabled
    assert not asking.stop.disabled
    assert endless.open_streams == 1
    asking.stop.click()
    turn = wait_for_turn(asking, "stopped")
    assert turn.note == "Stopped."
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)
    assert asking.stop.disabled
    asking.stop.click()  # nothing runs: nothing happens


def test_an_answer_that_fails_says_why_and_gives_the_prompt_back(asking: Any, upstream: MockUpstream) -> None:
    async def refuse(_: web.Request, __: Any) -> web.Response:
        return web.json_response({"error": {"message": "The tokens ran out."}}, status=400)

    upstream.respond = refuse
    asking.prompt.value = "Hello"
    asking.send.click()
    turn = wait_for_turn(asking, "failed")
    assert "The tokens ran out." in turn.note
    assert asking.prompt.value == "Hello"


def test_a_choice_stays_when_other_models_come_and_go(
    asking: Any, configure: Callable[[str], None], client: Client
) -> None:
    configure("another")
    client.load("another", progress=False)
    wait_until(lambda: "another" in asking._loaded, "the other model", 5)
    assert asking.model.value == "ask"
    client.unload("another")
    wait_until(lambda: "another" not in asking._loaded, "its end", 5)
    assert asking.model.value == "ask"


def test_a_model_can_be_chosen_before_it_is_loaded(
    panel: Panel, asking: Any, configure: Callable[[str], None], client: Client
) -> None:
    configure("later")
    wait_until(lambda: any(row.model.model_id == "later" for row in panel.models.rows.values()), "its row", 5)  # type: ignore[union-attr]
    panel._lane.call(lambda: asking.choose("later"))
    assert panel._lane.settle(5)
    assert asking.send.disabled
    client.load("later", progress=False)
    wait_until(lambda: not asking.send.disabled, "its load", 5)
    assert asking.model.value == "later"


def test_a_model_that_goes_away_for_a_while_is_not_replaced_by_another(
    panel: Panel, asking: Any, configure: Callable[[str], None], client: Client
) -> None:
    configure("another")
    client.load("another", progress=False)
    wait_until(lambda: "another" in asking._loaded, "the other model", 5)
    client.unload("ask")
    wait_until(lambda: asking.send.disabled, "the loss", 5)
    assert panel._lane.settle(5)
    assert asking.model.value == "ask"
    assert ("ask (not loaded)", "ask") in asking.model.options
    assert "ask is not loaded" in asking._no_model.value
    client.load("ask", progress=False)
    wait_until(lambda: not asking.send.disabled, "its return", 5)
    assert asking.model.value == "ask"


def test_the_figures_of_an_answer_leave_out_what_is_not_known() -> None:
    from llmkit.client import Answer
    from llmkit.schemas import Timings, Usage

    timings = Timings(queue=0, load=0, first_token=None, total=0.5, tokens_per_second=None)
    answer = Answer(response="x", model_id="m", request_id="r", timings=timings)
    assert note(measured(answer)) == "0.50 s in all"
    answer.usage = Usage(completion_tokens=1)
    answer.finish_reason = "length"
    assert note(measured(answer)) == "1 token · 0.50 s in all · cut off at the token limit"
    answer.cost = Cost(amount=0.00123, currency="EUR")
    assert "0.00123 EUR" in note(measured(answer))


# -- conversations -------------------------------------------------------------------------------------------------


def ask(prompt: Any, text: str) -> Any:
    count = len(prompt.transcript.turns)
    prompt.prompt.value = text
    prompt.send.click()
    wait_until(lambda: len(prompt.transcript.turns) > count, "the turn", 5)
    return wait_for_turn(prompt, "done")


def test_what_was_said_is_sent_along_unless_that_is_turned_off(asking: Any, upstream: MockUpstream) -> None:
    ask(asking, "One")
    ask(asking, "Two")
    assert [(m["role"], m["content"]) for m in upstream.requests[-1][2]["messages"]] == [
        ("user", "One"),
        ("assistant", ANSWER),
        ("user", "Two"),
    ]
    asking.remember.value = False
    ask(asking, "Three")
    assert [m["content"] for m in upstream.requests[-1][2]["messages"]] == ["Three"]


def test_a_conversation_is_there_again_after_the_kernel_began_anew(panel: Panel, asking: Any, client: Client) -> None:
    asking.system.value = "Be brief."
    asking.options["temperature"].switch.value = True
    asking.options["temperature"].control.value = 1.5
    ask(asking, "One")
    asking.prompt.value = "and a half-written"
    asking.tick()
    wait_until(lambda: [c.turns for c in client.conversations().conversations][:1] == [1], "the copy", 5)
    wait_until(lambda: client.conversation(asking.keeper.conversation_id).draft == "and a half-written", "draft", 5)

    second = Panel(client)
    try:
        wait_until(lambda: second.prompt is not None and second.prompt.transcript.turns, "the turns", 5)
        again = second.prompt
        assert again is not None
        wait_until(lambda: again.model.value == "ask", "the model", 5)
        assert [(turn.prompt, turn.text, turn.state) for turn in again.transcript.turns] == [("One", ANSWER, "done")]
        assert again.transcript.turns[0].note == asking.transcript.turns[0].note
        assert (again.prompt.value, again.system.value) == ("and a half-written", "Be brief.")
        assert again.options["temperature"].given == {"temperature": 1.5}
        assert again.options["seed"].given == {}

        # Both go on with it: nothing is lost, the later one has a conversation of its own then.
        ask(asking, "From the first")
        wait_until(
            lambda: client.conversation(asking.keeper.conversation_id).turns[-1].prompt == "From the first", "it"
        )
        ask(again, "From the second")
        wait_until(lambda: again.keeper.conversation_id != asking.keeper.conversation_id, "the fork", 5)
        kept = [
            [turn.prompt for turn in client.conversation(tab.keeper.conversation_id).turns] for tab in (asking, again)
        ]
        assert kept == [["One", "From the first"], ["One", "From the second"]]
    finally:
        second.close()


def test_a_new_conversation_leaves_the_old_one_to_be_opened_again(panel: Panel, asking: Any, client: Client) -> None:
    ask(asking, "One")
    first = asking.keeper.conversation_id
    asking.new.click()
    assert panel._lane.settle(5)
    assert asking.transcript.turns == []
    ask(asking, "Two")
    wait_until(lambda: len(asking.conversations.options) == 2, "both", 5)
    assert [title for title, _ in asking.conversations.options] == ["Two", "One"]
    asking.conversations.value = first
    wait_until(lambda: [turn.prompt for turn in asking.transcript.turns] == ["One"], "the first", 5)
    assert panel._lane.settle(5)
    asking.delete.click()
    wait_until(lambda: [c.title for c in client.conversations().conversations] == ["Two"], "the deletion", 5)
    wait_until(lambda: asking.transcript.turns == [], "the empty tab", 5)

    # A slip of the hand is taken back.
    assert not hidden(asking.undo)
    asking.undo.click()
    wait_until(lambda: {c.title for c in client.conversations().conversations} == {"One", "Two"}, "its return", 5)
    assert [turn.prompt for turn in asking.transcript.turns] == ["One"]
    assert hidden(asking.undo)


def test_a_conversation_that_cannot_be_read_is_said_and_hides_no_other(
    panel: Panel, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.save_conversation("readable", ConversationRequest(title="Readable"))
    client.save_conversation("strange", ConversationRequest(title="Strange"))
    call = client.connection.call

    def changed(method: str, path: str, **more: Any) -> Any:
        told = call(method, path, **more)
        if (method, path) == ("GET", "llm/conversations/"):
            told["conversations"][0]["turns"] = "several"
        if (method, path) == ("GET", "llm/conversations/readable"):
            told["turns"] = [{"said": 5}]
        return told

    monkeypatch.setattr(client.connection, "call", changed)
    again = Panel(client)
    try:
        wait_until(lambda: again.prompt is not None and len(again.prompt.conversations.options) == 2, "the list")
        assert again.prompt is not None
        assert "Readable" in [title for title, _ in again.prompt.conversations.options]
        wait_until(lambda: "1 conversation is not listed" in again.prompt._note.value, "the note")
    finally:
        again.close()


def test_nothing_is_kept_of_a_conversation_without_a_word(panel: Panel, client: Client) -> None:
    assert panel.prompt is not None
    assert panel.prompt.prompt.value == FIRST_QUESTION
    panel.prompt.tick()
    assert panel._lane.settle(5)
    assert client.conversations().conversations == []


def test_a_conversation_that_cannot_be_kept_says_so_and_goes_on(
    panel: Panel, asking: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise DiskFull("The disk is full.", hint="Make room.")

    monkeypatch.setattr(client, "save_conversation", refuse)
    turn = ask(asking, "One")
    assert turn.text == ANSWER
    wait_until(lambda: "The disk is full." in asking._trouble.value, "the words", 5)
    monkeypatch.undo()
    ask(asking, "Two")
    wait_until(lambda: not asking._trouble.value, "no trouble", 5)
    assert len(client.conversation(asking.keeper.conversation_id).turns) == 2


def test_a_conversation_is_written_as_markdown_beside_the_notebook(
    panel: Panel, asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ask(asking, "What is ../../the capital?")
    for _ in range(2):
        asking.export.click()
        assert panel._lane.settle(5)
    assert {file.name for file in tmp_path.iterdir()} == {"what-is-the-capital.md", "what-is-the-capital-2.md"}
    assert "what-is-the-capital-2.md" in asking._note.value
    text = (tmp_path / "what-is-the-capital.md").read_text("utf-8")
    assert text.startswith("# What is ../../the capital?")
    assert ANSWER in text
    monkeypatch.setattr(Path, "open", _no_space)
    asking.export.click()
    assert panel._lane.settle(5)
    assert "No space left" in asking._note.value


def _no_space(path: Path, *_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device", str(path))


def test_images_go_before_the_prompt_where_the_model_sees(asking: Any, upstream: MockUpstream) -> None:
    assert not hidden(asking.images)  # nobody knows what the endpoint can do
    about = {"name": "a.png", "type": "image/png", "size": 3, "last_modified": datetime.now(UTC)}
    asking.images.value = [{**about, "content": memoryview(b"abc")}]
    ask(asking, "What is it?")
    images, prompt = upstream.requests[-1][2]["messages"]
    assert images["content"] == [{"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}]
    assert prompt["content"] == "What is it?"
    assert asking.images.value == ()
    assert asking.transcript.turns[-1].images == ["data:image/png;base64,YWJj"]


def test_a_model_that_does_not_see_gets_no_images(asking: Any, upstream: MockUpstream) -> None:
    about = {"name": "a.png", "type": "image/png", "size": 3, "last_modified": datetime.now(UTC)}
    asking.images.value = [{**about, "content": memoryview(b"abc")}]
    ask(asking, "What is it?")
    asking._desk.lane.call(lambda: _be_blind(asking))
    assert asking._desk.lane.settle(5)
    assert hidden(asking.images)
    ask(asking, "And now?")
    assert "image_url" not in str(upstream.requests[-1][2])


def _be_blind(asking: Any) -> None:
    model = asking._loaded["ask"]
    blind = model.capabilities.model_copy(update={"vision": False})
    asking._loaded["ask"] = model.model_copy(update={"capabilities": blind})
    asking._draw()


def test_a_save_that_finds_no_server_is_tried_again_for_the_conversation_it_was_for(
    panel: Panel, asking: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> int:
        raise TimedOut("The server did not answer.")

    monkeypatch.setattr(client, "save_conversation", lose)
    ask(asking, "One")
    first = asking.keeper.conversation_id
    wait_until(lambda: "did not answer" in asking._trouble.value, "the words", 5)
    asking.new.click()
    assert panel._lane.settle(5)
    assert asking.keeper.conversation_id != first
    monkeypatch.undo()
    wait_until(lambda: [c.conversation_id for c in client.conversations().conversations] == [first], "it", 5)
    assert [turn.prompt for turn in client.conversation(first).turns] == ["One"]


def test_a_save_whose_answer_was_lost_makes_no_second_conversation(
    panel: Panel, asking: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = client.save_conversation

    def lose(*given: Any) -> int:
        save(*given)
        raise TimedOut("The server did not answer.")

    monkeypatch.setattr(client, "save_conversation", lose)
    ask(asking, "One")
    wait_until(lambda: "did not answer" in asking._trouble.value, "the words", 5)
    monkeypatch.undo()
    ask(asking, "Two")
    name = asking.keeper.conversation_id
    wait_until(lambda: len(client.conversation(name).turns) == 2, "both", 5)
    assert [c.conversation_id for c in client.conversations().conversations] == [name]


def test_nothing_is_saved_when_only_the_model_comes_and_goes(panel: Panel, asking: Any, client: Client) -> None:
    ask(asking, "One")
    name = asking.keeper.conversation_id
    wait_until(lambda: client.conversations().conversations, "the copy", 5)
    revision = client.conversation(name).revision
    client.unload("ask")
    wait_until(lambda: asking.send.disabled, "the loss", 5)
    asking.tick()
    second = Panel(client)
    try:
        wait_until(lambda: second.prompt is not None and second.prompt.transcript.turns, "the turns", 5)
        assert second._lane.settle(5)
        assert panel._lane.settle(5)
        assert [(c.conversation_id, c.revision) for c in client.conversations().conversations] == [(name, revision)]
    finally:
        second.close()


def test_a_parameter_that_makes_no_sense_is_off(panel: Panel, client: Client) -> None:
    client.save_conversation(
        "odd", ConversationRequest(draft="Hello", parameters={"temperature": None, "top_p": "much", "seed": 7})
    )
    made = Panel(client)
    try:
        wait_until(lambda: made.prompt is not None and made.prompt.prompt.value == "Hello", "the draft", 5)
        assert made.prompt is not None
        assert {name: option.given for name, option in made.prompt.options.items()} == {
            "temperature": {},
            "top_p": {},
            "max_tokens": {},
            "seed": {"seed": 7},
        }
        assert made._watcher is not None
    finally:
        made.close()


def test_who_may_not_prompt_cannot_send(client: Client, lane: Lane) -> None:
    prompt = PromptTab(Desk(client, lane, Kit(), frozenset({"read"}), *[print] * 5))
    models = [{"model_id": "a", "config_id": "a", "model_name": "n", "model_type": "t", "status": "loaded"}]
    prompt.update(Snapshot.model_validate({"epoch": "e", "revision": 1, "models": models}))
    assert prompt.send.disabled
