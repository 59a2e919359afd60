"""A conversation as the panel holds it: what was said, what comes next, and its copy at the server.

The server keeps it, so that a restarted kernel and a second panel find it again.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmkit.client import Client
from llmkit.errors import ConnectError, ConversationChanged, LLMKitError, NotAllowed, NotFound, NotReady, TimedOut
from llmkit.panel.desk import Desk
from llmkit.panel.transcript import Turn
from llmkit.schemas import ConversationList, ConversationRequest, ConversationSummary, ConversationTurn

TITLE_CHARACTERS = 60
UNTITLED = "New conversation"
FIRST_QUESTION = "What is the capital of France?"
KEPT_IMAGE_CHARACTERS = 2 << 20
"""Of all images of a conversation, as data URLs; the latest ones are kept."""
_FILE_NAME = re.compile(r"[^a-z0-9]+")
_FENCE = re.compile(r"^`{3,}", re.MULTILINE)


def new_id() -> str:
    """Give a name for a conversation that nobody has."""
    return uuid.uuid4().hex


def title_of(turns: Iterable[Turn]) -> str:
    """Name a conversation after its first prompt."""
    first = next(iter(turns), None)
    words = " ".join(first.prompt.split()) if first else ""
    return words if len(words) <= TITLE_CHARACTERS else f"{words[: TITLE_CHARACTERS - 1].rstrip()}…"


def messages_of(turns: Iterable[Turn], *, images: bool) -> list[dict[str, Any]]:
    """Give what was said so far as OpenAI's messages, with or without its images; without turns that have no answer."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn.text and turn.state in ("done", "stopped"):
            messages += [*image_messages(turn.images if images else []), {"role": "user", "content": turn.prompt}]
            messages.append({"role": "assistant", "content": turn.text})
    return messages


def image_messages(images: Iterable[str]) -> list[dict[str, Any]]:
    """Give images, as data URLs, as the message that goes before a prompt."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [{"role": "user", "content": parts}] if parts else []


def to_markdown(title: str, system: str, turns: Iterable[Turn]) -> str:
    """Write a conversation for people, as a Markdown document."""
    parts = [f"# {title or UNTITLED}"]
    if system:
        parts += ["**System prompt**", _quoted(system)]
    for turn in turns:
        parts += ["## Prompt", _quoted(turn.prompt)]
        if turn.images:
            parts.append(f"*{len(turn.images)} image(s) went with it.*")
        parts.append(f"## {turn.model_id}")
        if turn.reasoning:
            parts += ["<details><summary>Reasoning</summary>", _fenced(turn.reasoning), "</details>"]
        if turn.text:
            parts.append(turn.text)
        parts += [_fenced(json.dumps(call, indent=2, ensure_ascii=False), "json") for call in turn.tool_calls]
        if turn.note:
            parts.append(f"*{turn.note}*")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(found.group()) for found in _FENCE.finditer(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def write_markdown(folder: Path, title: str, text: str) -> Path:
    """Write a file that was not there before, named after the conversation."""
    stem = _FILE_NAME.sub("-", title.lower()).strip("-")[:40] or "conversation"
    number = 1
    while True:
        path = folder / (f"{stem}.md" if number == 1 else f"{stem}-{number}.md")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            number += 1
        else:
            return path


def turns_of(kept: Iterable[ConversationTurn]) -> list[Turn]:
    """Give the turns of a conversation that was kept, as the transcript shows them."""
    return [
        Turn(
            model_id=one.model_id,
            prompt=one.prompt,
            images=list(one.images),
            text=one.response,
            reasoning=one.reasoning or "",
            tool_calls=list(one.tool_calls or []),
            state=one.state,
            note=one.note,
        )
        for one in kept
    ]


def kept_of(turns: Sequence[Turn]) -> list[ConversationTurn]:
    """Give the turns that have ended, as they are kept."""
    room = KEPT_IMAGE_CHARACTERS
    kept: list[ConversationTurn] = []
    for turn in reversed(turns):
        if turn.state == "streaming":
            continue
        room -= sum(map(len, turn.images))
        kept.append(
            ConversationTurn(
                model_id=turn.model_id,
                prompt=turn.prompt,
                images=list(turn.images) if room >= 0 else [],
                response=turn.text,
                reasoning=turn.reasoning or None,
                tool_calls=list(turn.tool_calls) or None,
                state=turn.state,
                note=turn.note,
            )
        )
    return kept[::-1]


class Keeper:
    """Keeps one conversation at the server, one write after the other; for the panel's thread alone.

    Parameters
    ----------
    desk
        What the tabs share.
    gather
        Gives the conversation as it is now, without a revision.
    listed
        Is given the conversations that the server has, whenever they were asked for.
    troubled
        Is told what is wrong with the keeping, and None once nothing is.
    """

    def __init__(
        self,
        desk: Desk,
        gather: Callable[[], ConversationRequest],
        listed: Callable[[list[ConversationSummary]], Any],
        troubled: Callable[[LLMKitError | None], Any],
    ) -> None:
        self._desk = desk
        self._gather = gather
        self._listed = listed
        self._troubled = troubled
        self.conversation_id = new_id()
        self.enabled = True
        self._kept: ConversationRequest | None = None
        self._revisions: dict[str, int] = {}
        self._waiting: dict[str, ConversationRequest] = {}
        self._unsure: dict[str, ConversationRequest] = {}
        self._saving = False
        self._after: list[Callable[[], Any]] = []

    def start(self, conversation_id: str | None = None, revision: int | None = None) -> None:
        """Go on with a conversation that was kept, or with a new one, as it is now."""
        self.conversation_id = conversation_id or new_id()
        if revision is not None:
            self._revisions[self.conversation_id] = revision
        self._kept = self._gather()

    def save(self) -> None:
        """Keep what a person has changed since it was kept, and what could not be kept before."""
        body = self._gather()
        if self.enabled and self._is_anything(body) and _without_model(body) != _without_model(self._kept):
            self._kept = body
            self._waiting[self.conversation_id] = body
        self._save_next()

    def after_saves(self, then: Callable[[], Any]) -> None:
        """Do something once nothing waits to be kept any more, or cannot be."""
        self._after.append(then)
        self._save_next()

    def _is_anything(self, body: ConversationRequest) -> bool:
        known = self.conversation_id in self._revisions
        return known or bool(body.turns) or body.draft.strip() not in ("", FIRST_QUESTION)

    def _save_next(self) -> None:
        if self._saving:
            return
        if not self._waiting:
            self._go_on()
            return
        self._saving = True
        conversation_id, body = next(iter(self._waiting.items()))
        del self._waiting[conversation_id]
        revision, unsure = self._revisions.get(conversation_id), self._unsure.pop(conversation_id, None)

        def saved(answer: tuple[str, int]) -> None:
            kept_as, now = answer
            self._revisions[kept_as] = now
            if kept_as != conversation_id:
                if self.conversation_id == conversation_id:
                    self.conversation_id = kept_as
                if later := self._waiting.pop(conversation_id, None):
                    self._waiting[kept_as] = later
            self._saving = False
            self._troubled(None)
            self._save_next()
            self.list_again()

        def failed(error: LLMKitError) -> None:
            self._saving = False
            if isinstance(error, NotAllowed):
                self.enabled = False
                self._waiting.clear()
            else:
                self._troubled(error)
            if isinstance(error, ConnectError | TimedOut | NotReady):
                self._unsure[conversation_id] = body
                self._waiting.setdefault(conversation_id, body)  # with the next save
            self._go_on()

        client = self._desk.client
        self._desk.lane.ask(lambda: _put(client, conversation_id, body, revision, unsure), saved, failed)

    def _go_on(self) -> None:
        after, self._after = self._after, []
        for then in after:
            then()

    def list_again(self) -> None:
        """Ask which conversations the server has."""
        self._desk.lane.ask(self._desk.client.conversations, self._take_list)

    def _take_list(self, told: ConversationList) -> None:
        self.enabled = self.enabled and told.kept
        self._listed(told.conversations if told.kept else [])

    def delete(self, then: Callable[[LLMKitError | None], Any]) -> None:
        """Let the server forget this conversation; ``then`` is told whether that went wrong."""
        conversation_id = self.conversation_id
        self._waiting.pop(conversation_id, None)

        def work() -> None:
            with contextlib.suppress(NotFound):  # it was never kept, or another panel was quicker
                self._desk.client.delete_conversation(conversation_id)

        def deleted(_: None) -> None:
            then(None)
            self.list_again()

        # A write that is on its way would bring it back.
        self.after_saves(lambda: self._desk.lane.ask(work, deleted, then))


def _without_model(body: ConversationRequest | None) -> ConversationRequest | None:
    """Leave out what changes by itself, as models come and go."""
    return body.model_copy(update={"model_id": None}) if body is not None else None


def _put(
    client: Client,
    conversation_id: str,
    body: ConversationRequest,
    revision: int | None,
    unsure: ConversationRequest | None,
) -> tuple[str, int]:
    """Keep a conversation; give the name that it has then, and its revision.

    Parameters
    ----------
    client
        The server.
    conversation_id
        Its name.
    body
        As it is now.
    revision
        What this follows.
    unsure
        What was sent before without an answer, if there was such a time.
    """
    try:
        sent = body.model_copy(update={"revision": revision})
        return conversation_id, client.save_conversation(conversation_id, sent)
    except ConversationChanged:
        if unsure is not None:
            with contextlib.suppress(NotFound, ConversationChanged):
                there = client.conversation(conversation_id)
                if _says_the_same(there, unsure):  # only the answer was lost
                    follows = body.model_copy(update={"revision": there.revision})
                    return conversation_id, client.save_conversation(conversation_id, follows)
        # Another panel went on with it in another way: this one becomes a conversation of its own.
        own = new_id()
        return own, client.save_conversation(own, body)


def _says_the_same(one: ConversationRequest, other: ConversationRequest) -> bool:
    fields = set(ConversationRequest.model_fields) - {"revision"}
    return one.model_dump(include=fields) == other.model_dump(include=fields)
