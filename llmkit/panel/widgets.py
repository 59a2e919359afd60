"""Small things that every tab uses: widgets with our classes, made to work beside a running cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as w

HIDDEN = "llmkit-hidden"
STATIC = Path(__file__).parent / "static"
W = TypeVar("W", bound=w.Widget)


def read_module(*names: str) -> str:
    """Give files of ``static`` as the one JavaScript module of a widget, what all have in common first.

    A front end has no files of ours, so nothing can be imported.
    """
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in ("page.js", *names))


class Kit:
    """Makes the widgets of one panel.

    A widget normally brings a layout and a style of its own, each another message to the browser. Ours are looked
    after by the style sheet, so all widgets of a panel share one layout, and those of one kind one style.
    """

    def __init__(self) -> None:
        self._layout = w.Layout()
        self._styles: dict[type[w.Widget], w.Widget] = {}

    def make(self, kind: type[W], *args: Any, **values: Any) -> W:
        """Make any widget."""
        if kind in self._styles:
            values["style"] = self._styles[kind]
        made: W = kind(*args, layout=self._layout, **values)
        if made.has_trait("style"):
            self._styles[kind] = made.style
        return made

    def button(self, text: str, on_click: Callable[[], Any], *, style: str = "", tip: str = "") -> w.Button:
        """Make a button that calls a function without arguments."""
        made = self.make(w.Button, description=text, button_style=style, tooltip=tip or None)
        made.add_class("llmkit-button")
        made.on_click(lambda _: on_click())
        return made

    def html(self, value: str = "", *classes: str) -> w.HTML:
        """Make a place for a piece of `markup`."""
        made = self.make(w.HTML, value)
        for name in ("llmkit-html", *classes):
            made.add_class(name)
        return made

    def box(self, *children: w.Widget, name: str = "", kind: type[w.Box] = w.VBox) -> w.Box:
        """Put widgets below each other."""
        made = self.make(kind, list(children))
        if name:
            made.add_class(name)
        return made

    def row(self, *children: w.Widget, name: str = "") -> w.Box:
        """Put widgets beside each other; they wrap where there is no room."""
        return self.box(*children, kind=w.HBox, name=name)


def show(widget: w.DOMWidget, *, visible: bool) -> None:
    """Show or hide a widget."""
    if visible:
        widget.remove_class(HIDDEN)
    else:
        widget.add_class(HIDDEN)


def assign(widget: w.Widget, **values: Any) -> None:
    """Set what differs; what is equal is not sent again, so folds stay open and the focus where it is."""
    for name, value in values.items():
        if getattr(widget, name) != value:
            setattr(widget, name, value)


def beside_cells(widget: w.Widget) -> None:
    """Let a widget and everything in it answer while a cell is running.

    JupyterLab sends what a user does to a subshell, but ipykernel 7 hands it to the shell that last sent on the
    widget's comm: the main one, which is busy with the cell. Without that (private) routing the message stays in
    the subshell. Other kernels have no such attribute, and nothing happens.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = None  # noqa: SLF001  # there is no public way
    for child in getattr(widget, "children", ()):
        beside_cells(child)


def close_all(widget: w.Widget) -> None:
    """Take a widget and everything in it away."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    widget.close()
