"""A fold of the form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.panel.fields import Argument, Field
from llmkit.panel.form_values import Place
from llmkit.panel.widgets import Kit, assign, beside_cells, show


class Section:
    """Some fields below a heading; they are made when it is opened for the first time.

    Parameters
    ----------
    arguments
        What can be entered, by its place.
    changed
        Called after every change of a field, on whatever thread it happens.
    toggled
        Called when a person presses the heading.
    """

    def __init__(
        self,
        kit: Kit,
        title: str,
        arguments: dict[Place, Argument],
        changed: Callable[[], Any],
        toggled: Callable[[Section], Any],
    ) -> None:
        self._kit = kit
        self._changed = changed
        self.title = title
        self.arguments = arguments
        self.fields: dict[Place, Field] = {}
        self.is_open = False
        # The triangle is the style sheet's: a screen reader has no use for its name.
        self.header = kit.button(title, lambda: toggled(self))
        self.header.add_class("llmkit-fold")
        self.body = kit.box(name="llmkit-grid")
        self.widget = kit.box(self.header, self.body, name="llmkit-section")
        self._show()

    def toggle(self) -> None:
        """Open or close it."""
        self.open(wanted=not self.is_open)

    def open(self, *, wanted: bool = True) -> None:
        """Open it, or close it; what was entered stays."""
        self.is_open = wanted
        if wanted and not self.fields:
            self.fields = {place: Field(self._kit, one, self._changed) for place, one in self.arguments.items()}
            self.body.children = tuple(field.widget for field in self.fields.values())
            beside_cells(self.body)
        self._show()

    def _show(self) -> None:
        show(self.body, visible=self.is_open)
        (self.header.add_class if self.is_open else self.header.remove_class)("llmkit-open")
        assign(self.header, tooltip=f"{self.title}: {'shown, press to hide' if self.is_open else 'press to show'}")
