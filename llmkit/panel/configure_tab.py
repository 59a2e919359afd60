"""The tab *Configure*: a form that the server's own schemas make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ipywidgets as w

from llmkit.client import Configuration, ModelType
from llmkit.errors import ConfigurationExists, LLMKitError
from llmkit.panel import markup
from llmkit.panel.desk import Desk
from llmkit.panel.fields import Argument, Field, read_arguments
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import Kit, assign, beside_cells, close_all, show
from llmkit.schemas import ModelConfigRequest

NAMES = ("model_id", "model_name")
POLICIES = ("description", "auto_load", "max_in_flight", "max_queued")
GROUPS = {"memory": "Memory", "parallelism": "Parallelism", "other": "More engine arguments"}


class Section:
    """A fold of the form; its fields are made when it is opened for the first time."""

    def __init__(self, kit: Kit, title: str, arguments: list[Argument]) -> None:
        self._kit = kit
        self.fields: dict[str, Field] = {}
        self._title = title
        self._arguments = arguments
        self._open = False
        self.header = kit.button(f"▸ {title}", lambda: None)
        self.header.add_class("llmkit-fold")
        self._body = kit.box(name="llmkit-grid")
        self.widget = kit.box(self.header, self._body, name="llmkit-section")
        show(self._body, visible=False)

    def toggle(self) -> None:
        """Open or close it."""
        self._open = not self._open
        if self._open and not self.fields:
            self.fields = {argument.name: Field(self._kit, argument) for argument in self._arguments}
            self._body.children = tuple(field.widget for field in self.fields.values())
            beside_cells(self._body)
        show(self._body, visible=self._open)
        assign(self.header, description=f"{'▾' if self._open else '▸'} {self._title}")


class ConfigureTab:
    """Makes a configuration."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        kit = desk.kit
        self._types: dict[str, ModelType] = {}
        self._shown: str | None = None
        named = {argument.name: argument for argument in read_arguments(ModelConfigRequest.model_json_schema())}
        self.names = {name: Field(kit, named[name]) for name in NAMES}
        self.model_type = kit.make(w.Dropdown, description="model_type", options=())
        self.model_type.add_class("llmkit-field-top")
        self.model_type.observe(lambda _: desk.lane.call(self._choose), "value")
        self._about_type = kit.html()
        self.essential: dict[str, Field] = {}
        self._essential = kit.box(name="llmkit-grid")
        self.sections: list[Section] = []
        self._policies = [named[name] for name in POLICIES]
        self._sections = kit.box(name="llmkit-sections")
        self.save = kit.button("Save", lambda: self._on_save(load=False), tip="Store the configuration")
        self.save_and_load = kit.button("Save and load", lambda: self._on_save(load=True), style="primary")
        self._result = kit.html()
        type_field = kit.box(self.model_type, self._about_type, name="llmkit-field")
        self.widget = kit.box(
            kit.box(type_field, *(field.widget for field in self.names.values()), name="llmkit-grid"),
            self._essential,
            self._sections,
            kit.row(self.save_and_load, self.save, name="llmkit-buttons"),
            self._result,
            name="llmkit-tab",
        )
        beside_cells(self.widget)

    # -- the form ----------------------------------------------------------------------------------------------

    def offer(self, types: Iterable[ModelType]) -> None:
        """Take the server's model types."""
        self._types = {one.name: one for one in types}
        names = tuple(self._types)
        if names != self.model_type.options:
            self.model_type.options = names
        # What can be used comes first to mind.
        usable = [one.name for one in self._types.values() if one.available]
        if self._shown is None and "vllm" in usable:
            self.model_type.value = "vllm"
        self._choose()

    def _choose(self) -> None:
        """Show the arguments of the chosen type; what belongs to all types stays as it is."""
        chosen = self._types.get(self.model_type.value or "")
        if chosen is None:
            return
        about = chosen.summary if chosen.available else f"{chosen.summary}. It cannot run here: {chosen.reason}"
        assign(self._about_type, value=markup.hint(about))
        if self._shown == chosen.name:
            return
        self._shown = chosen.name
        before = (*self._essential.children, *self._sections.children)
        arguments = read_arguments(chosen.arguments)
        self.essential = {one.name: Field(self._desk.kit, one) for one in arguments if one.group == "essential"}
        self._essential.children = tuple(field.widget for field in self.essential.values())
        folds = [(title, [one for one in arguments if one.group == group]) for group, title in GROUPS.items()]
        folds += [("Generation defaults", read_arguments(chosen.generation)), ("Policies", self._policies)]
        self.sections = [Section(self._desk.kit, title, inside) for title, inside in folds if inside]
        for section in self.sections:
            section.header.on_click(lambda _, section=section: self._desk.lane.call(section.toggle))
        self._sections.children = tuple(section.widget for section in self.sections)
        for widget in before:
            close_all(widget)
        assign(self._result, value="")
        beside_cells(self.widget)

    def _fields(self) -> dict[str, Field]:
        fields = {**self.names, **self.essential}
        for section in self.sections:
            fields |= section.fields
        return fields

    # -- saving ------------------------------------------------------------------------------------------------

    def _on_save(self, *, load: bool) -> None:
        def begin() -> None:
            if self.save.disabled:
                return
            self._allow(saving=True)
            given: dict[str, Any] = {}
            for field in self._fields().values():
                field.complain()
                given |= field.given
            assign(self._result, value="")
            if missing := [name for name in NAMES if name not in given]:
                for name in missing:
                    self.names[name].complain("is missing")
                self._allow(saving=False)
                return
            key = next((f for f in self._fields().values() if isinstance(f.control, KeyField)), None)
            if key is None:
                self._send(given, load=load)
                return
            # The key comes in a message of its own, goes into the request, and is nowhere after that.
            name = key.argument.name
            key.control.collect(
                lambda value: self._desk.lane.call(
                    lambda: self._send({**given, **({name: value} if value else {})}, load=load)
                ),
                lambda error: self._desk.lane.call(lambda: self._refused(error)),
            )

        self._desk.lane.call(begin)

    def _send(self, given: Mapping[str, Any], *, load: bool) -> None:
        own = {name: given[name] for name in NAMES}
        policies = {name: given[name] for name in POLICIES if name in given}
        kwargs = {name: value for name, value in given.items() if name not in (*NAMES, *POLICIES)}
        model_type = self.model_type.value or ""

        def work() -> Configuration:
            made = self._desk.client.configure(**own, model_type=model_type, model_kwargs=kwargs, **policies)
            if load:
                self._desk.client.start_loading(made.model_id)
            return made

        self._desk.lane.ask(work, lambda made: self._saved(made, load=load), self._refused)

    def _saved(self, made: Configuration, *, load: bool) -> None:
        self._allow(saving=False)
        for field in self._fields().values():
            field.clear()
        assign(self._result, value=markup.note(f"{made.model_id} is saved."))
        if load:
            self._desk.open_models()

    def _refused(self, error: LLMKitError) -> None:
        """Put the server's words where they belong: at the field, or under the form."""
        self._allow(saving=False)
        fields = self._fields()
        rest = []
        for one in error.details.get("fields") or []:
            path, message = str(one.get("path", "")), str(one.get("message", ""))
            field = fields.get(_name_of(path))
            if field is None:
                rest.append(f"{path}: {message}" if path else message)
            else:
                field.complain(message)
        if isinstance(error, ConfigurationExists):
            fields["model_id"].complain(error.message)
        elif rest or not error.details.get("fields"):
            shown = LLMKitError("; ".join(rest) or error.message, hint=error.hint)
            assign(self._result, value=markup.error_card(shown))
        else:
            assign(self._result, value=markup.field_error("Some fields need another value."))

    def _allow(self, *, saving: bool) -> None:
        for each in (self.save, self.save_and_load):
            assign(each, disabled=saving)


def _name_of(path: str) -> str:
    """Give the field that a path of the server points to: ``model_kwargs.engine.dtype`` is ``dtype``."""
    parts = [part for part in path.split(".") if part not in ("model_kwargs", "engine", "generation")]
    return parts[0] if parts else ""
