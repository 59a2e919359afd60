"""Find API keys in notebooks: in sources, outputs, metadata, attachments and the state of widgets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

LEAST_VALUE: Final = 8
"""A shorter value of a variable would be found in words that are none."""
LEAST_KINDS: Final = 8
"""A key has at least so many different characters; ``sk-xxxxxxxx`` is an example, no key."""

# Before a key stands nothing that would belong to it, so that it is no piece of a longer text, as of an image; a line
# end in the printed form of a text ends with a letter.
_BEFORE: Final = r"(?:(?<![A-Za-z0-9_+/\-])|(?<=\\[nrt]))"
_KINDS: Final = {
    "llmkit key": ("llmkit-", r"[A-Za-z0-9]{43}(?![A-Za-z0-9])"),
    "Anthropic key": ("sk-ant-", r"[A-Za-z0-9_\-]{16,}"),
    "OpenAI key": ("sk-", r"[A-Za-z0-9_\-]{16,}"),
    "Hugging Face token": ("hf_", r"[A-Za-z0-9]{20,}"),
    "Google key": ("AIza", r"[A-Za-z0-9_\-]{30,}"),
    "GitHub token": ("ghp_", r"[A-Za-z0-9]{20,}"),
    "Groq key": ("gsk_", r"[A-Za-z0-9]{20,}"),
    "xAI key": ("xai-", r"[A-Za-z0-9]{20,}"),
}
_PATTERNS: Final = {
    name: (prefix, re.compile(_BEFORE + re.escape(prefix) + f"(?P<rest>{rest})"))
    for name, (prefix, rest) in _KINDS.items()
}
_LIKE_WORDS: Final = frozenset({"OpenAI key"})
"""Names of styles and files begin so, too: ``sk-toggleable__label-arrow``. They have no figures."""
_BEARER: Final = re.compile(r"\bBearer\s+(?P<rest>[A-Za-z0-9._~+/\-]{16,}=*)", re.IGNORECASE)
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Finding:
    """A key in a notebook, without the key.

    Attributes
    ----------
    file
        The notebook.
    cell
        Number of the cell, from 1; None for what belongs to the whole notebook.
    place
        Where in it: ``source``, ``output 1``, ``metadata``, ``widget state``.
    line
        In the text of that place, from 1.
    kind
        Of whom the key is, or the name of the variable whose value it is.
    masked
        What it begins with, and how long it is.
    """

    file: str
    cell: int | None
    place: str
    line: int
    kind: str
    masked: str

    def __str__(self) -> str:
        cell = f"cell {self.cell}, " if self.cell is not None else ""
        return f"{self.file}: {cell}{self.place}, line {self.line}: {self.kind} {self.masked}"

    def to_wire(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


class Unreadable(Exception):
    """A file is no notebook, or cannot be read."""


def secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the values that may stand in no notebook, with the names of their variables.

    Examples
    --------
    >>> secrets_of({"MY_API_KEY": "0123456789", "HF_TOKEN": "short", "HOME": "/home/ada"})
    {'0123456789': 'MY_API_KEY'}
    """
    named = ((name, value.strip()) for name, value in sorted(environ.items()))
    return {
        value: name
        for name, value in named
        if name.upper().endswith(("_API_KEY", "_TOKEN")) and len(value) >= LEAST_VALUE
    }


def check_notebook(file: Path, secrets: Mapping[str, str]) -> list[Finding]:
    """Find the keys in a notebook.

    Parameters
    ----------
    file
        The notebook.
    secrets
        Values that are keys too, with the names of their variables; see `secrets_of`.

    Raises
    ------
    Unreadable
        If it is no notebook, or cannot be read.
    """
    try:
        notebook = json.loads(file.read_bytes())
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    except (ValueError, RecursionError):
        raise Unreadable("it is no JSON") from None
    if not isinstance(notebook, dict) or not ("cells" in notebook or "worksheets" in notebook):
        raise Unreadable("it is no notebook")
    found = [
        Finding(str(file), cell, place, line, kind, masked)
        for cell, place, text in _texts(notebook)
        for line, kind, masked in _keys_in(text, secrets)
    ]
    return list(dict.fromkeys(found))


def _keys_in(text: str, secrets: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Give line, kind and masked form of each key in a text."""
    text = _ANSI.sub("", text)
    taken: list[tuple[int, int]] = []

    def new(start: int, end: int) -> bool:
        if any(start < other_end and end > other_start for other_start, other_end in taken):
            return False  # it is told under another name
        taken.append((start, end))
        return True

    for value, name in secrets.items():
        start = text.find(value)
        while start >= 0:
            if new(start, start + len(value)):
                yield _line(text, start), f"value of {name}", _mask("", len(value))
            start = text.find(value, start + len(value))
    for kind, (prefix, pattern) in _PATTERNS.items():
        for match in pattern.finditer(text):
            made_up = kind in _LIKE_WORDS and not _has_figures(match["rest"])
            if _is_varied(match["rest"]) and not made_up and new(*match.span()):
                yield _line(text, match.start()), kind, _mask(prefix, len(match[0]))
    for match in _BEARER.finditer(text):
        if _is_varied(match["rest"]) and _has_figures(match["rest"]) and new(*match.span("rest")):
            yield _line(text, match.start()), "Bearer token", _mask("Bearer ", len(match["rest"]))


def _is_varied(rest: str) -> bool:
    return len(set(rest)) >= LEAST_KINDS


def _has_figures(rest: str) -> bool:
    return sum(map(str.isdigit, rest)) >= 2


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _mask(prefix: str, length: int) -> str:
    return f"{prefix}*** ({length} characters)"


# -- the texts of a notebook ---------------------------------------------------------------------------------------


def _texts(notebook: dict[str, Any]) -> Iterator[tuple[int | None, str, str]]:
    """Give cell, place and content of every text in a notebook, keys of objects too."""
    sheets = [notebook, *_list(notebook.get("worksheets"))]
    cells = [cell for sheet in sheets if isinstance(sheet, dict) for cell in _list(sheet.get("cells"))]
    for number, cell in enumerate(cells, 1):
        parts = cell if isinstance(cell, dict) else {"content": cell}
        for name, part in parts.items():
            if name == "outputs":
                for index, output in enumerate(_list(part), 1):
                    yield from ((number, f"output {index}", text) for text in _strings(output))
            else:
                place = {"input": "source"}.get(name, name)
                yield from ((number, place, text) for text in _strings(part))
    metadata = notebook.get("metadata")
    for name, part in metadata.items() if isinstance(metadata, dict) else ():
        place = "widget state" if name == "widgets" else "metadata"
        yield from ((None, place, text) for text in (name, *_strings(part)))
    rest = {name: part for name, part in notebook.items() if name not in ("cells", "worksheets", "metadata")}
    yield from ((None, "notebook", text) for text in _strings(rest))


def _strings(value: Any) -> Iterator[str]:
    """Give every text in a JSON value; a list of texts is one, as the lines of a source are."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            waiting += reversed(one.values())
        elif isinstance(one, list) and all(isinstance(part, str) for part in one):
            # Lines have their line ends; what has none is a list of words.
            yield "".join(part if part.endswith("\n") else f"{part}\n" for part in one)
        elif isinstance(one, list):
            waiting += reversed(one)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
