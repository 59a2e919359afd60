"""The tab *Prompt*: a conversation with a loaded model, its answers as they come."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import ipywidgets as w

from llmkit.client.conversations import KeptConversations
from llmkit.client.usage import Usage, describe_left
from llmkit.errors import BudgetExhausted, LLMKitError
from llmkit.panel import code, conversation, markup
from llmkit.panel.asking import Asking, Outcome
from llmkit.panel.code_view import CodeView
from llmkit.panel.conversation import FIRST_QUESTION, Keeper
from llmkit.panel.desk import Desk
from llmkit.panel.options import generation_options, offer_models
from llmkit.panel.transcript import Transcript
from llmkit.panel.widgets import assign, beside_cells, show
from llmkit.schemas import Conversation, ConversationRequest, ConversationSummary, Model, Snapshot

IMAGE_TYPES = "image/png,image/jpeg,image/webp,image/gif"
MAX_IMAGE_BYTES = 4 << 20


class PromptTab:
    """Asks one model at a time."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._loaded: dict[str, Model] = {}
        self._busy = False
        """While another conversation comes or this one goes."""
        self._listing = False
        self._known: list[ConversationSummary] = []

        kit = desk.kit
        self.model = kit.make(w.Dropdown, description="Model", options=())
        self._no_model = kit.html(markup.hint("No model is loaded. Load one under Models."))
        self.conversations = kit.make(w.Dropdown, description="Conversation", options=((conversation.UNTITLED, ""),))
        self.new = kit.button("New", self._on_new, tip="Begin a new conversation; this one is kept")
        self.delete = kit.button("Delete", self._on_delete, tip="Delete this conversation")
        self.transcript = kit.make(Transcript)
        self._asking = Asking(desk, self.transcript)
        self.system = kit.make(w.Textarea, description="System prompt (optional)", rows=1)
        self.prompt = kit.make(
            w.Textarea,
            description="Prompt",
            value=FIRST_QUESTION,
            rows=3,
            placeholder="Ask something; Ctrl+Enter sends it",
        )
        self.prompt.add_class("llmkit-user-prompt")
        self.options = generation_options(desk)
        self.remember = kit.make(w.Checkbox, description="Remember what was said", value=True, indent=False)
        self.remember.tooltip = "Send the earlier prompts and answers along"
        self.images = kit.make(w.FileUpload, description="Add images", accept=IMAGE_TYPES)
        self.images.multiple = True
        self.send = kit.button("Send", self._on_send, style="primary", tip="Send the prompt (Ctrl+Enter)")
        self.send.add_class("llmkit-send")
        self.stop = kit.button("Stop", lambda: desk.lane.call(self._asking.stop), tip="End the answer")
        self.export = kit.button("Save as Markdown", self._on_export, tip="Write the conversation into a file")
        self.undo = kit.button("Undo", self._on_undo, tip="Bring the deleted conversation back")
        self._deleted: ConversationRequest | None = None
        self._note = kit.html()
        self._trouble = kit.html()
        self.code = CodeView(kit, lambda: desk.lane.call(self._show_code))
        remember = kit.row(self.remember, name="llmkit-option")
        self.widget = kit.box(
            kit.row(
                kit.box(self.model, self._no_model, name="llmkit-field"),
                kit.row(self.conversations, self.new, self.delete, name="llmkit-conversation"),
                name="llmkit-prompt-top",
            ),
            self.system,
            self.transcript,
            self.prompt,
            kit.row(
                kit.row(self.send, self.stop, self.images, self.export, name="llmkit-buttons"),
                remember,
                name="llmkit-composer",
            ),
            kit.row(*(option.widget for option in self.options.values()), name="llmkit-options"),
            kit.row(self._note, self.undo, name="llmkit-deleted"),
            self._trouble,
            self.code.widget,
            name="llmkit-tab",
        )
        for field in (self.model, self.conversations, self.system, self.prompt):
            field.add_class("llmkit-field-top")
        show(self.undo, visible=False)
        self.keeper = Keeper(desk, self._gather, self._list, self._tell_trouble)
        self.keeper.start()
        for control, name in (
            (self.model, "value"),
            (self.system, "value"),
            (self.prompt, "value"),
            (self.remember, "value"),
            (self.images, "value"),
            *((control, "value") for option in self.options.values() for control in (option.switch, option.control)),
        ):
            control.observe(lambda _: desk.lane.call(self._changed), name)
        self.conversations.observe(self._on_choice, "value")
        self._draw()
        beside_cells(self.widget)

    # -- showing -----------------------------------------------------------------------------------------------

    def update(self, snapshot: Snapshot) -> None:
        """Offer the models that are loaded now; the choice stays where it can."""
        self._loaded = {model.model_id: model for model in snapshot.models if model.status == "loaded"}
        offer_models(self.model, snapshot.models)
        self._draw()

    def choose(self, model_id: str) -> None:
        """Choose a model; it may be loaded later."""
        if model_id not in self._loaded:
            self.model.options = [*((name, name) for name in self._loaded), (f"{model_id} (not loaded)", model_id)]
        self.model.value = model_id

    def _draw(self) -> None:
        answering = self._asking.running
        model = self._loaded.get(self.model.value or "")
        if model is None:
            chosen = f"{self.model.value} is not loaded" if self.model.value else "No model is loaded"
            assign(self._no_model, value=markup.hint(f"{chosen}. Load it under Models."))
        show(self._no_model, visible=model is None)
        assign(self.send, disabled=answering or self._busy or model is None or "execute" not in self._desk.may)
        assign(self.stop, disabled=not answering)
        for each in (self.new, self.delete, self.conversations):
            assign(each, disabled=answering or self._busy)
        assign(self.export, disabled=not self.transcript.turns)
        show(self.images, visible=model is not None and _may_see(model))
        self._show_code()

    def _show_code(self) -> None:
        model_id = self.model.value
        if model_id is not None and self.code.is_open:
            self.code.show(("Ask", code.prompt(self._body(model_id, self.prompt.value))))

    # -- asking ------------------------------------------------------------------------------------------------

    def _body(self, model_id: str, prompt: str) -> dict[str, Any]:
        """Give what is sent, as the body of ``POST /llm/inference/``."""
        options: dict[str, Any] = {}
        for option in self.options.values():
            options |= option.given
        model = self._loaded.get(model_id)
        if system := self.system.value.strip():
            options["system"] = system
        if model is None or model.capabilities.api != "completions":  # else there is no place for messages
            sees = model is not None and _may_see(model)
            turns = self.transcript.turns if self.remember.value else []
            said = conversation.messages_of(turns, images=sees)
            if messages := [*said, *conversation.image_messages(self._attached() if sees else [])]:
                options["messages"] = messages
        return {"model_id": model_id, "prompt": prompt, "inference_kwargs": options}

    def _attached(self) -> list[str]:
        return [
            f"data:{one['type']};base64,{base64.b64encode(one['content']).decode('ascii')}"
            for one in self.images.value
            if len(one["content"]) <= MAX_IMAGE_BYTES
        ]

    def _on_send(self) -> None:
        self._desk.lane.call(self._begin)

    def _begin(self) -> None:
        model_id, prompt = self.model.value, self.prompt.value
        if self._asking.running or self._busy or model_id is None or not prompt.strip():
            return
        self._say()
        too_large = [one["name"] for one in self.images.value if len(one["content"]) > MAX_IMAGE_BYTES]
        if too_large:
            text = f"{', '.join(too_large)}: larger than {MAX_IMAGE_BYTES >> 20} MiB. Make it smaller first."
            self._say(markup.field_error(text))
            return
        body = self._body(model_id, prompt)
        images = self._attached()
        pictures = self.images.value
        self._asking.begin(body, lambda outcome: self._ended(outcome, prompt, pictures), images)
        assign(self.prompt, value="")
        self.images.value = ()
        self._draw()

    def _ended(self, outcome: Outcome, prompt: str, pictures: tuple[Any, ...]) -> None:
        if outcome.error is not None and not self.prompt.value:  # to try it again
            self.prompt.value = prompt
            self.images.value = pictures
        if isinstance(outcome.error, BudgetExhausted):
            self._desk.lane.ask(self._desk.client.usage, self._say_left)
        self._draw()
        self.keeper.save()

    def _say_left(self, usage: Usage) -> None:
        if left := describe_left(usage.limits, usage.left):
            self._say(markup.note(f"{left}. It grows again as the minute and the day go on."))

    # -- conversations -----------------------------------------------------------------------------------------

    def restore(self, known: KeptConversations, latest: Conversation | None) -> None:
        """Go on with the conversation that was changed last, after the kernel or the page began anew."""
        self.keeper.enabled = known.kept and "execute" in self._desk.may
        if latest is not None:
            self._open(latest)
        self._list(known.conversations)
        if known.unreadable:
            which = "1 conversation is" if known.unreadable == 1 else f"{known.unreadable} conversations are"
            self._say(markup.note(f"{which} not listed: this version of llmkit cannot read what the server keeps."))

    def tick(self) -> None:
        """Keep what was changed since the last time, and look where a prompt stands that waits."""
        self._asking.tick()
        if not self._asking.running and not self._busy:
            self.keeper.save()

    def stop_answer(self) -> None:
        """End the answer that is on its way."""
        self._asking.stop()

    def _changed(self) -> None:
        self._draw()

    def _gather(self) -> ConversationRequest:
        parameters: dict[str, Any] = {}
        for option in self.options.values():
            parameters |= option.given
        turns = self.transcript.turns
        draft = self.prompt.value
        return ConversationRequest(
            title=conversation.title_of(turns),
            model_id=self.model.value,
            system=self.system.value,
            draft=draft,
            parameters=parameters,
            turns=conversation.kept_of(turns),
        )

    def _open(self, kept: Conversation) -> None:
        try:
            self._fill(kept)
        finally:  # or what is shown would be kept in another's place
            self.keeper.start(kept.conversation_id, kept.revision)
        self._draw()

    def _fill(self, kept: ConversationRequest) -> None:
        self._say()
        self.transcript.show(conversation.turns_of(kept.turns))
        assign(self.system, value=kept.system)
        assign(self.prompt, value=kept.draft)
        for option in self.options.values():
            option.set(kept.parameters)
        if kept.model_id is not None:
            self.choose(kept.model_id)

    def _list(self, known: list[ConversationSummary]) -> None:
        """Take the conversations that are kept."""
        self._known = known
        self._offer()

    def _offer(self) -> None:
        """Offer the conversations; the one that is shown is among them in any case."""
        shown = self.keeper.conversation_id
        titles = [(one.title or conversation.UNTITLED, one.conversation_id) for one in self._known]
        if shown not in [one.conversation_id for one in self._known]:
            titles.insert(0, (conversation.title_of(self.transcript.turns) or conversation.UNTITLED, shown))
        # New options choose the first of them by themselves, which nobody has asked for.
        self._listing = True
        try:
            assign(self.conversations, options=tuple(titles))
            if not self._busy:
                assign(self.conversations, value=shown)
        finally:
            self._listing = False
        show(self.conversations, visible=self.keeper.enabled)
        self._draw()

    def _on_choice(self, change: dict[str, Any]) -> None:
        if not self._listing:
            self._desk.lane.call(lambda: self._choose(change["new"]))

    def _choose(self, conversation_id: str | None) -> None:
        if not conversation_id or conversation_id == self.keeper.conversation_id:
            return
        if self._asking.running or self._busy:
            self._offer()
            return
        self.keeper.save()
        self._busy = True
        self._draw()

        def opened(kept: Conversation) -> None:
            self._busy = False
            self._open(kept)
            self._offer()

        def failed(error: LLMKitError) -> None:
            self._busy = False
            self._say(markup.error_card(error))
            self._offer()
            self.keeper.list_again()

        def ask() -> None:
            self._desk.lane.ask(lambda: self._desk.client.conversation(conversation_id), opened, failed)

        self.keeper.after_saves(ask)  # else it may come as it was before

    def _on_new(self) -> None:
        def begin() -> None:
            if not self._asking.running and not self._busy:
                self.keeper.save()
                self._start_anew()
                self.keeper.list_again()

        self._desk.lane.call(begin)

    def _start_anew(self) -> None:
        self._say()
        self.transcript.clear()
        assign(self.prompt, value="")
        self.keeper.start()
        self._offer()

    def _on_delete(self) -> None:
        def delete() -> None:
            if self._asking.running or self._busy:
                return
            self._busy = True
            self._draw()
            gone = self._gather()

            def deleted(error: LLMKitError | None) -> None:
                self._busy = False
                if error is not None:
                    self._say(markup.error_card(error))
                else:
                    self._start_anew()
                    self._say(markup.note("The conversation is deleted."), undo=gone)
                self._draw()

            self.keeper.delete(deleted)

        self._desk.lane.call(delete)

    def _on_undo(self) -> None:
        def undo() -> None:
            gone = self._deleted
            if gone is None or self._asking.running or self._busy:
                return
            self.keeper.save()
            self.keeper.start()
            self._fill(gone)
            self.keeper.save()

        self._desk.lane.call(undo)

    def _say(self, said: str = "", *, undo: ConversationRequest | None = None) -> None:
        """Say what was done last, and whether it can be taken back."""
        self._deleted = undo
        assign(self._note, value=said)
        show(self.undo, visible=undo is not None)

    def _tell_trouble(self, error: LLMKitError | None) -> None:
        text = f"This conversation is not kept by the server: {error}" if error else ""
        assign(self._trouble, value=markup.field_error(text) if text else "")

    def _on_export(self) -> None:
        def export() -> None:
            turns = self.transcript.turns
            title = conversation.title_of(turns)
            text = conversation.to_markdown(title, self.system.value.strip(), turns)
            try:
                path = conversation.write_markdown(Path.cwd(), title, text)
            except OSError as error:
                told = f"The file cannot be written: {error.strerror}: {error.filename}."
                self._say(markup.field_error(told))
            else:
                self._say(markup.note(f"Saved as {path}."))

        self._desk.lane.call(export)


def _may_see(model: Model) -> bool:
    """Say whether a model may take images; of many endpoints nobody knows."""
    return model.capabilities.vision is not False and model.capabilities.api != "completions"
