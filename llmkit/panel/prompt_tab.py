"""The tab *Prompt*: ask a loaded model, see the answer as it comes."""

from __future__ import annotations

import threading
from typing import Any

import ipywidgets as w

from llmkit.client import Answer, AnswerStream
from llmkit.errors import LLMKitError
from llmkit.panel import markup
from llmkit.panel.desk import Desk
from llmkit.panel.pace import paced
from llmkit.panel.transcript import Transcript
from llmkit.panel.widgets import assign, beside_cells, show
from llmkit.schemas import Snapshot

FIRST_QUESTION = "What is the capital of France?"
STOP_TRIES = 25
STOP_PAUSE_SECONDS = 0.2


class Option:
    """A generation parameter that is only sent if it is switched on."""

    def __init__(self, desk: Desk, name: str, label: str, control: w.DOMWidget) -> None:
        self.name = name
        self.control = control
        kit = desk.kit
        self.switch = kit.make(w.Checkbox, description=label, value=False, indent=False)
        self.switch.tooltip = "Off: as the model's configuration says"
        control.disabled = True
        control.description = label  # for who hears the page: beside its switch it is not seen
        self.switch.observe(lambda change: desk.lane.call(lambda: assign(control, disabled=not change["new"])), "value")
        self.widget = kit.row(self.switch, control, name="llmkit-option")

    @property
    def given(self) -> dict[str, Any]:
        """What to send."""
        return {self.name: self.control.value} if self.switch.value else {}


class PromptTab:
    """Asks one model at a time."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._wanted: str | None = None
        self._stream: AnswerStream | None = None
        self._stopping = False
        self._ended = threading.Event()

        kit = desk.kit
        self.model = kit.make(w.Dropdown, description="Model", options=())
        self._no_model = kit.html(markup.hint("No model is loaded. Load one under Models."))
        self.transcript = kit.make(Transcript)
        # A draft is sent to the kernel when the field is left, not at every key.
        self.system = kit.make(w.Textarea, description="System prompt (optional)", rows=1, continuous_update=False)
        self.prompt = kit.make(
            w.Textarea,
            description="Prompt",
            value=FIRST_QUESTION,
            rows=3,
            continuous_update=False,
            placeholder="Ask something; Ctrl+Enter sends it",
        )
        self.prompt.add_class("llmkit-user-prompt")
        slider = kit.make(w.FloatSlider, value=0.7, min=0, max=2, step=0.05, readout_format=".2f")
        self.temperature = Option(desk, "temperature", "Temperature", slider)
        number = kit.make(w.BoundedIntText, value=256, min=1, max=1_000_000)
        self.max_tokens = Option(desk, "max_tokens", "Max tokens", number)
        self.send = kit.button("Send", self._on_send, style="primary", tip="Send the prompt (Ctrl+Enter)")
        self.send.add_class("llmkit-send")
        self.stop = kit.button("Stop", self._on_stop, tip="End the answer")
        self.clear = kit.button("Clear", self._on_clear, tip="Take the answers away")
        self.widget = kit.box(
            kit.row(kit.box(self.model, self._no_model, name="llmkit-field"), self.system, name="llmkit-prompt-top"),
            self.transcript,
            self.prompt,
            kit.row(
                kit.row(self.send, self.stop, self.clear, name="llmkit-buttons"),
                kit.row(self.temperature.widget, self.max_tokens.widget, name="llmkit-options"),
                name="llmkit-composer",
            ),
            name="llmkit-tab",
        )
        for field in (self.model, self.system, self.prompt):
            field.add_class("llmkit-field-top")
        self._draw()
        beside_cells(self.widget)

    # -- showing -----------------------------------------------------------------------------------------------

    def update(self, snapshot: Snapshot) -> None:
        """Offer the models that are loaded now; the choice stays where it can."""
        loaded = tuple(model.model_id for model in snapshot.models if model.status == "loaded")
        chosen = self.model.value
        if loaded != self.model.options:
            self.model.options = loaded
            self.model.value = chosen if chosen in loaded else next(iter(loaded), None)
        if self._wanted in loaded:
            self.model.value, self._wanted = self._wanted, None
        self._draw()

    def choose(self, model_id: str) -> None:
        """Choose a model, now or as soon as it is loaded."""
        if model_id in self.model.options:
            self.model.value = model_id
        else:
            self._wanted = model_id

    def _draw(self) -> None:
        answering = self._stream is not None
        show(self._no_model, visible=not self.model.options)
        assign(self.send, disabled=answering or not self.model.options)
        assign(self.stop, disabled=not answering)
        assign(self.clear, disabled=answering)

    # -- asking ------------------------------------------------------------------------------------------------

    def _on_send(self) -> None:
        self._desk.lane.call(self._begin)

    def _begin(self) -> None:
        model_id, prompt, system = self.model.value, self.prompt.value, self.system.value.strip()
        if self._stream is not None or model_id is None or not prompt.strip():
            return
        options = {**self.temperature.given, **self.max_tokens.given}
        if system:
            options["system"] = system
        self._ended.clear()
        stream = self._stream = self._desk.client.stream(model_id, prompt, **options)
        self.transcript.begin(model_id, prompt)
        assign(self.prompt, value="")
        self._draw()
        self._desk.lane.ask(lambda: self._read(stream), self._end, self._fail)

    def _read(self, stream: AnswerStream) -> Answer | None:
        try:
            for text in paced(stream):
                self.transcript.append(text)
            return stream.answer
        finally:
            self._ended.set()

    def _end(self, answer: Answer | None) -> None:
        self._stream = None
        self.transcript.end(describe(answer) if answer else "")
        self._draw()

    def _fail(self, error: LLMKitError) -> None:
        stopped = self._stopping
        self._stream, self._stopping = None, False
        self.transcript.end("Stopped." if stopped else str(error), failed=not stopped)
        if not stopped and not self.prompt.value:
            self.prompt.value = self.transcript.turns[-1].prompt  # to try it again
        self._draw()

    def _on_stop(self) -> None:
        stream = self._stream
        if stream is None:
            return
        self._stopping = True

        def work() -> None:
            # A request that is only on its way cannot be cancelled yet.
            for _ in range(STOP_TRIES):
                stream.cancel()
                if self._ended.wait(STOP_PAUSE_SECONDS):
                    return

        self._desk.lane.ask(work)

    def _on_clear(self) -> None:
        def clear() -> None:
            if self._stream is None:
                self.transcript.clear()

        self._desk.lane.call(clear)


def describe(answer: Answer) -> str:
    """Say what an answer took."""
    parts = []
    if answer.usage and answer.usage.completion_tokens is not None:
        count = answer.usage.completion_tokens
        parts.append(f"{count} token" + ("" if count == 1 else "s"))
    if answer.timings.tokens_per_second is not None:
        parts.append(f"{answer.timings.tokens_per_second:.1f} tokens/s")
    if answer.timings.first_token is not None:
        parts.append(f"first token after {markup.seconds_in_words(answer.timings.first_token)}")
    parts.append(f"{markup.seconds_in_words(answer.timings.total)} in all")
    if answer.finish_reason == "length":
        parts.append("cut off at the token limit")
    return " · ".join(parts)
