"""Form fields from a JSON schema: what pydantic says about an argument becomes a widget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as w

from llmkit.panel import markup
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import Kit, assign

UNSET = "Default"
KEY_PLACEHOLDER = "a key, or env:NAME"


@dataclass(frozen=True)
class Argument:
    """What a schema says about one argument."""

    name: str
    kind: str
    """``string``, ``integer``, ``number``, ``boolean``, ``choice``, ``secret``; ``mixed`` for a text or a number,
    ``json`` for all else."""
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
    """One argument in a form; an empty field gives nothing."""

    def __init__(self, kit: Kit, argument: Argument) -> None:
        self.argument = argument
        self.control = _control(kit, argument)
        self._error = kit.html()
        help_text = kit.html(markup.hint(argument.description)) if argument.description else kit.html()
        self.widget = kit.box(self.control, help_text, self._error, name="llmkit-field")
        self.control.add_class("llmkit-field-top")

    @property
    def given(self) -> dict[str, Any]:
        """What was entered, by name; a key is never among it, `KeyField.collect` gives that."""
        if isinstance(self.control, KeyField):
            return {}
        value = self.control.value
        if value in (UNSET, "") or value is None:
            return {}
        return {self.argument.name: _parse(self.argument, value)}

    def complain(self, text: str = "") -> None:
        """Show what is wrong with the field, or that nothing is."""
        assign(self._error, value=markup.field_error(text) if text else "")
        mark: Callable[[str], Any] = self.control.add_class if text else self.control.remove_class
        mark("llmkit-wrong")

    def clear(self) -> None:
        """Empty the field."""
        self.complain()
        if isinstance(self.control, w.Dropdown):
            self.control.value = UNSET
        elif not isinstance(self.control, KeyField):
            self.control.value = ""


def _control(kit: Kit, argument: Argument) -> w.DOMWidget:
    name = argument.name
    if argument.kind == "secret":
        return kit.make(KeyField, name, KEY_PLACEHOLDER)
    if argument.kind in ("choice", "boolean"):
        choices = argument.choices or (("yes", True), ("no", False))
        options = [(UNSET, UNSET), *(one if isinstance(one, tuple) else (str(one), one) for one in choices)]
        return kit.make(w.Dropdown, description=name, options=options, value=UNSET)
    if argument.kind == "json":
        return kit.make(w.Textarea, description=name, rows=2, placeholder="JSON", continuous_update=False)
    example = f"for example {argument.examples[0]}" if argument.examples else ""
    placeholder = str(argument.default) if argument.default is not None else example
    return kit.make(w.Text, description=name, placeholder=placeholder, continuous_update=False)


def _parse(argument: Argument, value: Any) -> Any:
    """Turn what was typed into JSON; what is none goes to the server as it is, whose words say what is wrong."""
    if argument.kind not in ("integer", "number", "mixed", "json") or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
