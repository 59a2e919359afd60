"""Says to screen readers what the form shows: what explains a field, what is wrong, which folds are open."""

from __future__ import annotations

from pathlib import Path

import anywidget


class FormMarks(anywidget.AnyWidget):
    """Shows nothing; put into a tab, it looks after the fields and folds of the whole tab."""

    _esm = Path(__file__).parent / "static" / "form_marks.js"
