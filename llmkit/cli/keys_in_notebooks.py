"""Find API keys in notebooks: in sources, outputs, metadata, attachments and the state of widgets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

LEAST_VALUE: Final = 8
"""A shorter value of a variable would be found in words that are none."""
LEAST_KINDS: Final = 8
"""A key has at least so many different characters; ``sk-xxxxxxxx`` is an example, no key."""

# Before a key stands nothing that would belong to it, so that it is no piece of a longer text, as of an image; a line
# end in the printed form of a text ends with a letter, and so may a character in an address, as %3D.
_BEFORE: Final = r"(?:(?<![A-Za-z0-9_+/\-])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f][0-9A-Fa-f]))"
# In a path or behind a name a key is one if it has figures; no image is written with the mark within its beginning.
_WITHIN: Final = r"(?<=[_/])"
_KINDS: Final = {
    "llmkit key": ("llmkit-", r"[A-Za-z0-9]{43}(?![A-Za-z0-9])"),
    "Anthropic key": ("sk-ant-", r"[A-Za-z0-9_\-]{16,}"),
    "OpenAI key": ("sk-", r"[A-Za-z0-9_\-]{16,}"),
    "Hugging Face token": ("hf_", r"[A-Za-z0-9]{20,}"),
    "Google key": ("AIza", r"[A-Za-z0-9_\-]{30,}"),
    "Google key of a service account": ("AQ.Ab", r"[A-Za-z0-9_\-]{30,}"),
    "GitHub token": ("ghp_", r"[A-Za-z0-9]{20,}"),
    "GitHub token of an app's user": ("gho_", r"[A-Za-z0-9]{20,}"),
    "GitHub token for an app's user": ("ghu_", r"[A-Za-z0-9]{20,}"),
    "GitHub token of an app": ("ghs_", r"[A-Za-z0-9]{20,}"),
    "GitHub fine-grained token": ("github_pat_", r"[A-Za-z0-9_]{22,}"),
    "Groq key": ("gsk_", r"[A-Za-z0-9]{20,}"),
    "xAI key": ("xai-", r"[A-Za-z0-9]{20,}"),
    "Replicate token": ("r8_", r"[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
    "NVIDIA key": ("nvapi-", r"[A-Za-z0-9_\-]{32,}"),
    "Perplexity key": ("pplx-", r"[A-Za-z0-9]{32,}"),
    "Fireworks key": ("fw_", r"[A-Za-z0-9]{22,}(?![A-Za-z0-9_])"),
    "Together key": ("tgp_v1_", r"[A-Za-z0-9_\-]{30,}"),
    "AWS key": ("AKIA", r"[A-Z0-9]{16}(?![A-Za-z0-9+/])"),
    "Slack token": ("xoxb-", r"[A-Za-z0-9\-]{20,}"),
    "Slack token of a user": ("xoxp-", r"[A-Za-z0-9\-]{20,}"),
}
"""How keys begin, and how they go on."""
_PATTERNS: Final = {
    name: (prefix, re.compile(f"(?:{_BEFORE}|(?P<within>{_WITHIN}))" + re.escape(prefix) + f"(?P<rest>{rest})"))
    for name, (prefix, rest) in _KINDS.items()
}
_LIKE_WORDS: Final = frozenset({"OpenAI key", "Fireworks key"})
"""Names of styles and files begin so, too: ``sk-toggleable__label-arrow``. They have no figures."""
_NAMED: Final = {
    "Bearer token": ("bearer", r"\bBearer\s{1,9}(?P<rest>[A-Za-z0-9._~+/\-]{16,}=*)"),
    # The hash of a commit or a file has not this word before it.
    "Jupyter token": ("token", r"(?:\btoken\s{1,9}|[?&]token=)(?P<rest>[0-9a-f]{32,}(?![A-Za-z0-9]))"),
    "token in an address": ("token=", r"[?&](?:access_)?token=(?P<rest>[A-Za-z0-9._~\-]{20,})"),
    "value of an API key": (
        "key",
        r"api[_-]?key[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?P<rest>[A-Za-z0-9_\-]{20,}(?![A-Za-z0-9_\-.(\[]))",
    ),
    "value of a variable": (
        "_",
        r"(?-i:_(?:ACCESS_KEY|SECRET_KEY|SECRET|TOKEN))[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?P<rest>[A-Za-z0-9_\-]{20,}(?![A-Za-z0-9_\-.(\[]))",
    ),
}
"""What stands before a key that has no beginning of its own: a word that must be there, in small letters, and how."""
_NAMED_PATTERNS: Final = {name: (word, re.compile(p, re.IGNORECASE)) for name, (word, p) in _NAMED.items()}
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_SECRET_NAMES: Final = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


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
    """Give the values that may stand in no notebook, with the names of their variables; a path is none.

    Examples
    --------
    >>> secrets_of({"MY_API_KEY": "0123456789", "HF_TOKEN": "short", "HOME": "/home/ada"})
    {'0123456789': 'MY_API_KEY'}
    """
    named = ((name, value.strip()) for name, value in sorted(environ.items()))
    return {
        value: name
        for name, value in named
        if name.upper().endswith(_SECRET_NAMES) and len(value) >= LEAST_VALUE and not value.startswith("/")
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
        for form in _forms(value):
            start = text.find(form)
            while start >= 0:
                if new(start, start + len(form)):
                    yield _line(text, start), f"value of {name}", _mask("", len(value))
                start = text.find(form, start + len(form))
    for kind, (prefix, pattern) in _PATTERNS.items():
        # What is nowhere is not looked for with the slower pattern: outputs have images of many MB.
        for match in pattern.finditer(text) if prefix in text else ():
            needs_figures = kind in _LIKE_WORDS or match["within"] is not None
            if match["within"] is not None and prefix.isalpha():
                continue  # which an image may hold
            real = _is_varied(match["rest"]) and (not needs_figures or _has_figures(match["rest"]))
            if real and new(*match.span()):
                yield _line(text, match.start()), kind, _mask(prefix, len(match[0]))
    small = text.lower()
    for kind, (word, pattern) in _NAMED_PATTERNS.items():
        for match in pattern.finditer(text) if word in small else ():
            if _is_varied(match["rest"]) and _has_figures(match["rest"]) and new(*match.span("rest")):
                before = "Bearer " if word == "bearer" else ""
                yield _line(text, match.start()), kind, _mask(before, len(match["rest"]))


def _forms(value: str) -> list[str]:
    """Give how a value may be written: as it is, as Python and JSON print it, in HTML and in an address."""
    written = (value, repr(value)[1:-1], json.dumps(value)[1:-1], escape(value), quote(value, safe=""))
    return list(dict.fromkeys(written))


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
