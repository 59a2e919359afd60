"""The fields of a configuration: what can be entered, what was, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ipywidgets as w

from llmkit.client import ModelType
from llmkit.errors import ConfigurationExists, LLMKitError
from llmkit.panel import markup
from llmkit.panel.fields import Argument, Field, read_arguments
from llmkit.panel.form_check import stand_ins
from llmkit.panel.form_section import Section
from llmkit.panel.form_values import ENGINE, GENERATION, OWN, Place, gather, is_mark, place_of, spread
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import Kit, assign, beside_cells
from llmkit.schemas import OPTIONAL_FIELDS, ModelConfigRequest

MODEL_ID, MODEL_NAME = (OWN, "model_id"), (OWN, "model_name")
GROUPS = {"memory": "Memory", "parallelism": "Parallelism", "other": "More engine arguments"}
MISSING = "is missing"
_PRICES = {
    "input": "Price of a million prompt tokens.",
    "output": "Price of a million answer tokens.",
    "currency": "Three capital letters, for example EUR.",
}
_KEY_IS_TYPED = "typed"
"""Stands for a new key where a body is only shown."""


class TypeFields:
    """The fields that only one model type has; they stay when another is chosen."""

    def __init__(
        self, kit: Kit, kind: ModelType, changed: Callable[[], Any], toggled: Callable[[Section], Any]
    ) -> None:
        arguments = read_arguments(kind.arguments)
        self.kind = kind
        self.essential = {(ENGINE, one.name): Field(kit, one, changed) for one in arguments if one.group == "essential"}
        folds = {title: [one for one in arguments if one.group == group] for group, title in GROUPS.items()}
        self.sections = [
            Section(kit, title, {(ENGINE, one.name): one for one in inside}, changed, toggled)
            for title, inside in folds.items()
            if inside
        ]


class Form:
    """Makes the fields from the server's own schemas. Everything happens on the panel's thread.

    Parameters
    ----------
    changed
        Called after every change, on whatever thread it happens.
    call
        Does something on the panel's thread.
    """

    def __init__(self, kit: Kit, changed: Callable[[], Any], call: Callable[[Callable[[], Any]], Any]) -> None:
        self._kit = kit
        self._changed = changed
        self._toggled: Callable[[Section], Any] = lambda section: call(section.toggle)
        self._types: dict[str, ModelType] = {}
        self._made: dict[str, TypeFields] = {}
        self._shown: TypeFields | None = None
        self._kept: dict[Place, Any] = {}
        self._kept_type: str | None = None
        self._like: Mapping[str, Any] = {}
        self._generation: Section | None = None
        schema = ModelConfigRequest.model_json_schema()
        named = {one.name: one for one in read_arguments(schema)}
        self.names = {place: Field(kit, named[place[1]], changed) for place in (MODEL_ID, MODEL_NAME)}
        self._policies = Section(kit, "Policies", _policies(named, schema), changed, self._toggled)
        self.model_type = kit.make(w.Dropdown, description="model_type", options=())
        self.model_type.add_class("llmkit-field-top")
        self.model_type.observe(lambda _: call(self._choose), "value")
        self._about_type = kit.html()
        self.essential = kit.box(name="llmkit-grid")
        self.folds = kit.box(name="llmkit-sections")
        type_field = kit.box(self.model_type, self._about_type, name="llmkit-field")
        self.head = kit.box(type_field, *(field.widget for field in self.names.values()), name="llmkit-grid")
        self._as_it_was = self._entered()

    # -- types -------------------------------------------------------------------------------------------------

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

    @property
    def kind(self) -> ModelType | None:
        """The model type that is chosen."""
        return self._shown.kind if self._shown is not None else None

    def _choose(self) -> None:
        """Show the arguments of the chosen type; what was entered stays, also what only another type has."""
        chosen = self._types.get(self.model_type.value or "")
        if chosen is None:
            return
        about = chosen.summary if chosen.available else f"{chosen.summary}. It cannot run here: {chosen.reason}"
        assign(self._about_type, value=markup.hint(about))
        made = self._made.get(chosen.name)
        if made is not None and made is self._shown:
            return
        if made is None:
            made = self._made[chosen.name] = TypeFields(self._kit, chosen, self._changed, self._toggled)
        if self._generation is None:
            inside = {(GENERATION, one.name): one for one in read_arguments(chosen.generation)}
            self._generation = Section(self._kit, "Generation defaults", inside, self._changed, self._toggled)
        self._shown = made
        assign(self.essential, children=tuple(field.widget for field in made.essential.values()))
        assign(self.folds, children=tuple(section.widget for section in self.sections))
        for box in (self.essential, self.folds):
            beside_cells(box)
        self._changed()

    @property
    def sections(self) -> list[Section]:
        """The folds of the chosen type, and those of all types."""
        if self._shown is None or self._generation is None:
            return []
        return [*self._shown.sections, self._generation, self._policies]

    @property
    def fields(self) -> dict[Place, Field]:
        """Every field that there is by now, by its place."""
        fields = {**self.names, **(self._shown.essential if self._shown is not None else {})}
        for section in self.sections:
            fields |= section.fields
        return fields

    @property
    def key(self) -> tuple[Place, Field] | None:
        """The field of the key, if the chosen type has one."""
        return next(((place, f) for place, f in self.fields.items() if isinstance(f.control, KeyField)), None)

    @property
    def key_is_typed(self) -> bool:
        """Whether a new key was typed."""
        key = self.key
        return key is not None and isinstance(key[1].control, KeyField) and key[1].control.is_typed

    # -- values ------------------------------------------------------------------------------------------------

    def values(self) -> dict[Place, Any]:
        """Give what was entered, and what came with a configuration and has no field."""
        kept = self._kept if self.kind is not None and self.kind.name == self._kept_type else {}
        return {**kept, **{place: v for place, f in self.fields.items() for v in f.given.values()}}

    def body(self, values: Mapping[Place, Any] | None = None) -> dict[str, Any]:
        """Give the fields of the configuration, without those that are empty, and without a new key."""
        made = gather(self.values() if values is None else values, self._table, self._like)
        head: dict[str, Any] = {name: made[name] for name in ("model_id", "model_name") if name in made}
        return {**head, "model_type": self.model_type.value or "", **made}

    def body_with_key(self, key: str) -> dict[str, Any]:
        """Give the same with a key in it, which is to be sent and then forgotten."""
        place = self.key
        return self.body({**self.values(), **({place[0]: key} if place is not None and key else {})})

    def body_to_show(self) -> dict[str, Any]:
        """Give the same with a word in the place of a new key."""
        return self.body_with_key(_KEY_IS_TYPED if self.key_is_typed else "")

    def body_to_check(self) -> dict[str, Any]:
        """Give the same with other names in the place of those that are missing."""
        return {**stand_ins(), **self.body()}

    @property
    def has_id(self) -> bool:
        """Whether the model has a name."""
        return self.names[MODEL_ID].is_set

    @property
    def missing(self) -> list[Field]:
        """What has to be entered and is not."""
        return [field for field in self.names.values() if not field.is_set]

    @property
    def _table(self) -> Mapping[str, str]:
        return self.kind.table if self.kind is not None else {}

    def fill(self, told: Mapping[str, Any], *, as_copy: str | None = None) -> None:
        """Show a configuration as the server tells it; folds with something in them are opened.

        Parameters
        ----------
        as_copy
            The ``model_id`` of a new one that is alike; a key that the server keeps is not for that.

        Raises
        ------
        LLMKitError
            If the server has no such model type.
        """
        name = told["model_type"]
        if name not in self._types:
            raise LLMKitError(
                f"No model type {name} is installed here.", hint="Install the package that brings it, and try again."
            )
        self.clear()
        self.model_type.value = name
        self._choose()
        values = spread(told, self._table)
        if as_copy is not None:
            values = {place: value for place, value in values.items() if not is_mark(value)} | {MODEL_ID: as_copy}
        self._like = told.get("model_kwargs") or {}
        for section in self.sections:
            if section.arguments.keys() & values.keys():
                section.open()
        fields = self.fields
        for place in values.keys() & fields.keys():
            fields[place].put(values[place])
        self._kept = {place: value for place, value in values.items() if place not in fields}
        self._kept_type = name
        assign(self.names[MODEL_ID].control, disabled=as_copy is None)
        self._as_it_was = self._entered()

    def clear(self) -> None:
        """Empty every field, also those of other types, and close the folds."""
        self._kept, self._kept_type, self._like = {}, None, {}
        for section in self._all_sections():
            section.open(wanted=False)
        for field in self._all_fields():
            field.clear()
        assign(self.names[MODEL_ID].control, disabled=False)
        self._as_it_was = self._entered()

    @property
    def is_changed(self) -> bool:
        """Whether a person has entered something since the form was emptied or filled."""
        other_type = self._kept_type not in (None, self.model_type.value)
        return other_type or self._entered() != self._as_it_was

    def _entered(self) -> dict[int, Any]:
        entered: dict[int, Any] = {}
        for field in self._all_fields():
            typed = isinstance(field.control, KeyField) and field.control.is_typed
            if typed or field.given:
                entered[id(field)] = (typed, field.given)
        return entered

    def _all_sections(self) -> list[Section]:
        own = [section for made in self._made.values() for section in made.sections]
        return [*own, *([self._generation] if self._generation is not None else []), self._policies]

    def _all_fields(self) -> list[Field]:
        own = [field for made in self._made.values() for field in made.essential.values()]
        folded = [field for section in self._all_sections() for field in section.fields.values()]
        return [*self.names.values(), *own, *folded]

    # -- complaints --------------------------------------------------------------------------------------------

    def complain(self, error: LLMKitError | None = None, *, typing: bool = False) -> LLMKitError | None:
        """Put the server's words at the fields that they are about, and take older ones away.

        Parameters
        ----------
        typing
            Nothing is said at a field that is empty and was not touched yet.

        Returns
        -------
        LLMKitError or None
            What is about no field.
        """
        fields = self.fields
        told: dict[Place, list[str]] = {place: [] for place in fields}
        rest: list[str] = []
        for path, message in _problems(error):
            place = place_of(path, self._table)
            if place not in fields:
                rest.append(f"{path}: {message}" if path else message)
            elif message not in told[place]:
                told[place].append(message)
        for place, field in self.names.items():
            if not field.is_set:
                told[place] = [MISSING]
        for place, field in fields.items():
            quiet = typing and not field.touched and not field.is_set
            field.complain("" if quiet else "; ".join(told[place]))
        if error is None or not error.details.get("fields"):
            return error if rest or not _problems(error) else None
        return LLMKitError("; ".join(rest), hint=error.hint) if rest else None


def _problems(error: LLMKitError | None) -> list[tuple[str, str]]:
    """Give each thing that is wrong with its path."""
    if error is None:
        return []
    if fields := error.details.get("fields"):
        return [(str(one.get("path", "")), str(one.get("message", ""))) for one in fields]
    if not error.param:
        return []
    # Its hint names the request that changes the other one; here a person takes another name.
    hint = "" if isinstance(error, ConfigurationExists) else error.hint or ""
    return [(error.param, f"{error.message} {hint}".rstrip().replace("`", ""))]


def _policies(named: Mapping[str, Argument], schema: Mapping[str, Any]) -> dict[Place, Argument]:
    """Give what can be said about a configuration of any type; the prices are a field each."""
    prices = []
    for one in read_arguments(schema["$defs"]["Prices"]):
        about = _PRICES.get(one.name, one.description)
        prices.append(dataclasses.replace(one, name=f"prices.{one.name}", description=about))
    own = [one for name in OPTIONAL_FIELDS for one in (prices if name == "prices" else [named[name]])]
    return {(OWN, one.name): one for one in own}
