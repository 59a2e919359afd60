"""Form fields from a JSON schema: what pydantic says about an argument becomes a widget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as w

from llmkit.panel import markup
from llmkit.panel.form_text import field_problem
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import Kit, assign, show

UNSET = "Default"
KEY_PLACEHOLDER = "a key, or env:NAME"
_LONG_TEXT = 2000
"""From this many characters on a text has a place of several lines."""
_NOTHING: Any = object()


@dataclass(frozen=True)
class Argument:
    """What a schema says about one argument."""

    name: str
    kind: str
    """``string``, ``text`` (of several lines), ``integer``, ``number``, ``boolean``, ``choice``, ``secret``; ``mixed``
    for a text or a number, ``json`` for all else."""
    description: str = ""
    group: str = "other"
    choices: tuple[Any, ...] = ()
    default: Any = None
    examples: tuple[Any, ...] = ()


def read_arguments(schema: Mapping[str, Any]) -> list[Argument]:
    """Read every property of a JSON schema."""
    definitions = schema.get("$defs", {})
    return [_argument(name, one, definitions) for name, one in schema.get("properties", {}).items()]


def _argument(name: str, told: Mapping[str, Any], definitions: Mapping[str, Any]) -> Argument:
    options = _options(told, definitions)
    # A description, a group or a mark may stand at the property or at the one option that is not null.
    about = {key: value for one in (*options, told) for key, value in one.items()}
    # A single value that is allowed is a choice of one.
    options = [{"enum": [one["const"]], **one} if "const" in one else one for one in options]
    choices = tuple(value for one in options for value in one.get("enum", ()))
    types = {str(one.get("type", "")) for one in options}
    if about.get("secret"):
        kind = "secret"
    elif types == {"string"} and about.get("maxLength") == _LONG_TEXT:
        kind = "text"
    elif choices and all("enum" in one for one in options):
        kind = "choice"
    elif len(types) == 1 and types <= {"string", "integer", "number", "boolean"}:
        kind = types.pop()
    elif types and types <= {"string", "integer", "number", "boolean"}:
        kind = "mixed"
    else:
        kind = "json"
    return Argument(
        name=name,
        kind=kind,
        description=str(about.get("description") or ""),
        group=str(about.get("group") or "other"),
        choices=choices,
        default=told.get("default"),
        examples=tuple(about.get("examples") or ()),
    )


def _options(told: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give what a property may be, without null, alternatives and references resolved."""
    if "$ref" in told:
        return _options(definitions.get(str(told["$ref"]).rsplit("/", 1)[-1], {}), definitions)
    if "anyOf" in told:
        outer = {key: value for key, value in told.items() if key not in ("anyOf", "default", "title")}
        return [{**outer, **one} for inner in told["anyOf"] for one in _options(inner, definitions)]
    return [] if told.get("type") == "null" else [told]


class Field:
    """One argument in a form; an empty field gives nothing.

    Parameters
    ----------
    changed
        Called after every change, on whatever thread it happens.

    Attributes
    ----------
    touched
        Whether a person has changed it, so that it may be told what is wrong with it.
    """

    def __init__(self, kit: Kit, argument: Argument, changed: Callable[[], Any] = lambda: None) -> None:
        self.argument = argument
        self.touched = False
        self._changed = changed
        self._putting = False
        self._put: Any = _NOTHING
        self._shown: Any = None
        self.control = _control(kit, argument)
        self._error = kit.html()
        help_text = kit.html(markup.hint(argument.description)) if argument.description else kit.html()
        parts: list[w.Widget] = [self.control, help_text, self._error]
        self.forget: w.Button | None = None
        if isinstance(self.control, KeyField):
            self.control.on_typed = self._on_change
            self.forget = kit.button("Remove the key", self._on_forget, tip="Call the endpoint without this key")
            show(self.forget, visible=False)
            parts.insert(1, self.forget)
        else:
            self.control.observe(lambda _: self._on_change(), "value")
        self.widget = kit.box(*parts, name="llmkit-field")
        self.control.add_class("llmkit-field-top")

    @property
    def given(self) -> dict[str, Any]:
        """What was entered, by name; of a key only what stands for a stored one: `KeyField.collect` gives a new one."""
        if isinstance(self.control, KeyField):
            kept = self._put is not _NOTHING and not self.control.is_typed
            return {self.argument.name: self._put} if kept else {}
        value = self.control.value
        if self._put is not _NOTHING and value == self._shown:
            return {self.argument.name: self._put}  # as it came: nothing is lost on the way through a text
        if value in (UNSET, "") or value is None:
            return {}
        return {self.argument.name: _parse(self.argument, value)}

    @property
    def is_set(self) -> bool:
        """Whether anything stands in it."""
        return bool(self.given) or (isinstance(self.control, KeyField) and self.control.is_typed)

    def put(self, value: Any) -> None:
        """Show a value; until somebody changes it, the field gives just that."""
        self._fill(value)

    def complain(self, text: str = "") -> None:
        """Show what is wrong with the field, or that nothing is."""
        assign(self._error, value=field_problem(text) if text else "")
        mark: Callable[[str], Any] = self.control.add_class if text else self.control.remove_class
        mark("llmkit-wrong")

    def clear(self) -> None:
        """Empty the field; a key that was typed is gone from the page, too."""
        self.complain()
        self._fill(_NOTHING)

    def _fill(self, value: Any) -> None:
        self._putting = True
        try:
            self._put = value
            self.touched = False
            if isinstance(self.control, KeyField):
                self.control.forget()
                self.refresh()
            else:
                self.control.value = self._shown = self._write(value)
        finally:
            self._putting = False

    def _write(self, value: Any) -> Any:
        """Give how the widget shows a value."""
        if isinstance(self.control, w.Dropdown):
            if value is _NOTHING or value is None:
                return UNSET
            if not any(value == known for _, known in self.control.options):
                self.control.options = (*self.control.options, (str(value), value))
            return value
        return "" if value is _NOTHING or value is None else _write(self.argument, value)

    def refresh(self) -> None:
        """Say at a key field what is there already; to be called after a change, on the panel's thread."""
        if self.forget is None:
            return
        stored = self._put is not _NOTHING
        told = KEY_PLACEHOLDER
        if stored:
            told = self._put if isinstance(self._put, str) else "a key is stored"
            told = f"{told}; type to replace it"
        assign(self.control, placeholder=told)
        show(self.forget, visible=stored and not self.control.is_typed)

    def _on_forget(self) -> None:
        self._put = _NOTHING
        self._on_change()

    def _on_change(self) -> None:
        if not self._putting:
            self.touched = True
        self._changed()


def _control(kit: Kit, argument: Argument) -> w.DOMWidget:
    name = argument.name
    if argument.kind == "secret":
        return kit.make(KeyField, name, KEY_PLACEHOLDER)
    if argument.kind in ("choice", "boolean"):
        choices = argument.choices or (("yes", True), ("no", False))
        options = [(UNSET, UNSET), *(one if isinstance(one, tuple) else (str(one), one) for one in choices)]
        return kit.make(w.Dropdown, description=name, options=options, value=UNSET)
    # What is typed comes with every key, so that it can be checked while a person types.
    if argument.kind in ("json", "text"):
        placeholder = "JSON" if argument.kind == "json" else ""
        return kit.make(w.Textarea, description=name, rows=2, placeholder=placeholder, continuous_update=True)
    example = f"for example {argument.examples[0]}" if argument.examples else ""
    placeholder = str(argument.default) if argument.default is not None else example
    return kit.make(w.Text, description=name, placeholder=placeholder, continuous_update=True)


def _parse(argument: Argument, value: Any) -> Any:
    """Turn what was typed into JSON; what is none goes to the server as it is, whose words say what is wrong."""
    if argument.kind not in ("integer", "number", "mixed", "json") or not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return value
    return value if isinstance(parsed, float) and math.isinf(parsed) else parsed


def _no_number(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _write(argument: Argument, value: Any) -> str:
    """Give the text that `_parse` turns into a value."""
    if isinstance(value, str) and _parse(argument, value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
