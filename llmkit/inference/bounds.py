"""What a request may ask of an engine's grammar compiler, and of its way into the network.

A schema, a grammar or a pattern of a request is compiled by the engine, which some of them keep busy or end; a picture
that a request names by its address is fetched by the engine, from inside. Both are looked at in the body as it was
parsed, once, and only where a request has such a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic_core import from_json

from llmkit.engines.base import does_not_fit
from llmkit.errors import DoesNotFit

SCHEMA_PARAMETERS: Final = frozenset(
    {
        "response_format",
        "structured_outputs",
        "tools",
        "functions",
        "text",  # of responses: text.format
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_whitespace_pattern",
        "structural_tag",
    }
)
"""Parameters that an engine compiles, or hands to what does."""
MAX_SCHEMA_VALUES: Final = 50_000
MAX_SCHEMA_CHARACTERS: Final = 1 << 20
MAX_SCHEMA_DEPTH: Final = 48
MAX_PATTERN: Final = 4096
MAX_PATTERNS: Final = 64 << 10
"""Characters of all patterns of a request."""
MAX_GRAMMAR: Final = 64 << 10
MAX_REPEATS: Final = 10_000
MAX_GROUPS: Final = 32
"""Of a pattern or a grammar, one within the other."""

_PATTERNS: Final = frozenset({"pattern", "regex", "guided_regex", "whitespace_pattern", "guided_whitespace_pattern"})
_GRAMMARS: Final = frozenset({"grammar", "guided_grammar", "definition"})
_JSON_AS_TEXT: Final = frozenset({"json", "guided_json", "structural_tag"})
_REFERENCES: Final = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})

_ADDRESSES: Final = frozenset({"image_url", "video_url", "audio_url", "file_url"})
_OBJECTS: Final = frozenset({"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"})
"""In their place: what an engine would unpack."""
_NO_PATH: Final = ()

Path = tuple[Any, ...]
"""The last key and the path before it: made anew at every level, written out only for an error."""


def check_schemas(body: Mapping[str, Any], at: str = "") -> None:
    """Refuse schemas, grammars and patterns that are larger, deeper or more tangled than any request needs.

    Parameters
    ----------
    body
        Parameters of a request, as parsed.
    at
        Where they stand in it, for the path of the error.

    Raises
    ------
    DoesNotFit
    """
    if SCHEMA_PARAMETERS.isdisjoint(body):
        return
    looked_at = _Schemas()
    for name in SCHEMA_PARAMETERS & body.keys():
        looked_at.look({name: body[name]}, (at, _NO_PATH) if at else _NO_PATH)


class _Schemas:
    """All that a request gives to a compiler, counted together."""

    def __init__(self) -> None:
        self._values = 0
        self._characters = 0
        self._pattern_characters = 0

    def look(self, found: dict[str, Any], path: Path, depth: int = 0) -> None:
        stack: list[tuple[Any, Path, int]] = [(found, path, depth)]
        while stack:
            value, path, depth = stack.pop()
            if depth > MAX_SCHEMA_DEPTH:
                raise _refused(path, f"is nested deeper than {MAX_SCHEMA_DEPTH} levels")
            self._values += len(value)
            if self._values > MAX_SCHEMA_VALUES:
                raise _refused(path, f"has more than {MAX_SCHEMA_VALUES} values")
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(inner, str):
                    self._text(key, inner, path, depth)
                elif isinstance(inner, dict | list):
                    stack.append((inner, (key, path), depth + 1))
                    if key == "patternProperties" and isinstance(inner, dict):
                        for pattern in inner:
                            self._pattern(pattern, (pattern[:64], (key, path)))

    def _text(self, key: str | int, text: str, path: Path, depth: int) -> None:
        self._characters += len(text)
        if self._characters > MAX_SCHEMA_CHARACTERS:
            raise _refused((key, path), f"has more than {MAX_SCHEMA_CHARACTERS} characters")
        if key in _PATTERNS:
            self._pattern(text, (key, path))
        elif key in _GRAMMARS:
            if fault := grammar_fault(text):
                raise _refused((key, path), fault)
        elif key in _REFERENCES and text[:1] != "#":
            raise _refused((key, path), "must begin with #: nothing is read from elsewhere")
        elif key in _JSON_AS_TEXT:
            try:
                parsed = from_json(text)
            except ValueError:
                return  # the engine says what is wrong with it
            if isinstance(parsed, dict | list):
                self.look({str(key): parsed}, path, depth)

    def _pattern(self, pattern: str, path: Path) -> None:
        self._pattern_characters += len(pattern)
        fault = pattern_fault(pattern)
        if fault is None and self._pattern_characters > MAX_PATTERNS:
            fault = f"makes more than {MAX_PATTERNS} characters of patterns"
        if fault is not None:
            raise _refused(path, fault)


def _refused(path: Path, message: str, hint: str | None = None) -> DoesNotFit:
    keys: list[str] = []
    while path:
        keys.append(str(path[0])[:64])
        path = path[1]
    return does_not_fit([{"path": ".".join(reversed(keys)), "message": message}], hint)


# -- patterns ----------------------------------------------------------------------------------------------


class _Group:
    """What was read of a group of a pattern."""

    def __init__(self) -> None:
        self.weight = 1
        """The largest product of counted repetitions in it."""
        self.is_loop = False
        """Whether one of its alternatives is nothing but repetition: then to repeat it is catastrophic."""
        self._is_loose, self._loops = True, False  # of the alternative that is read

    def end_alternative(self) -> None:
        self.is_loop = self.is_loop or (self._is_loose and self._loops)
        self._is_loose, self._loops = True, False

    def add(self, least: int, most: int | None, *, is_loop: bool) -> None:
        if most is None or is_loop:
            self._loops = True
        elif least:
            self._is_loose = False


def pattern_fault(pattern: str) -> str | None:
    """Say what makes a regular expression too costly to compile or to match, or None.

    Its length, counted repetitions that multiply, groups in groups, and a repetition of what is nothing but
    repetition, as ``(a+)+`` or ``(a*b?)*``. It is read once, from left to right; one that is wrong is for the engine
    to refuse.
    """
    if len(pattern) > MAX_PATTERN:
        return f"is longer than {MAX_PATTERN} characters"
    groups = [_Group()]
    at = 0
    while at < len(pattern):
        sign = pattern[at]
        is_loop, weight = False, 1
        if sign == "(":
            if len(groups) > MAX_GROUPS:
                return f"has groups nested deeper than {MAX_GROUPS} levels"
            groups.append(_Group())
            at = _after_group_start(pattern, at + 1)
            continue
        if sign in "|^$":
            if sign == "|":
                groups[-1].end_alternative()
            at += 1
            continue
        if sign == ")" and len(groups) > 1:
            group = groups.pop()
            group.end_alternative()
            is_loop, weight = group.is_loop, group.weight
            at += 1
        else:
            at = _after_atom(pattern, at)
        at, least, most = _quantifier(pattern, at)
        if is_loop and (most is None or most > 1):
            return "repeats what is nothing but repetition, as in (a+)+"
        weight *= max(1, least if most is None else most)
        if weight > MAX_REPEATS:
            return f"repeats something more than {MAX_REPEATS} times"
        groups[-1].add(least, most, is_loop=is_loop)
        groups[-1].weight = max(groups[-1].weight, weight)
    return None


def _after_group_start(pattern: str, at: int) -> int:
    if pattern[at : at + 1] != "?":
        return at
    named = pattern[at + 1 : at + 3]
    if named[:1] == "P" or (named[:1] == "<" and named[1:] not in ("=", "!")):
        end = pattern.find(">", at)
        return end + 1 if end >= 0 else len(pattern)
    return at + (3 if named[:1] == "<" else 2)


def _after_atom(pattern: str, at: int) -> int:
    if pattern[at] == "\\":
        if pattern[at + 1 : at + 2] in ("p", "P", "u", "x") and pattern[at + 2 : at + 3] == "{":
            end = pattern.find("}", at)
            return end + 1 if end >= 0 else len(pattern)
        return at + 2
    if pattern[at] == "[":
        at += 1
        while at < len(pattern) and pattern[at] != "]":
            at += 2 if pattern[at] == "\\" else 1
    return at + 1


def _quantifier(pattern: str, at: int) -> tuple[int, int, int | None]:
    """Give where it ends, and how often what is before it comes at least and at most."""
    sign = pattern[at : at + 1]
    least, most, end = 1, 1, at
    unlimited = False
    if sign and sign in "*+?":
        least, unlimited, end = int(sign == "+"), sign != "?", at + 1
    elif sign == "{":
        close = pattern.find("}", at, at + 24)
        first, comma, second = pattern[at + 1 : close].partition(",") if close > 0 else ("", "", "")
        if _is_count(first) and (not second or _is_count(second)):
            least, end = int(first), close + 1
            unlimited = bool(comma) and not second
            most = int(second or first)
    if end > at and pattern[end : end + 1] in ("?", "+"):  # as little as possible, or without going back
        end += 1
    return end, least, None if unlimited else most


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def grammar_fault(grammar: str) -> str | None:
    """Say what makes a grammar too costly to compile, or None: its length, or groups in groups."""
    if len(grammar) > MAX_GRAMMAR:
        return f"is longer than {MAX_GRAMMAR} characters"
    depth = 0
    quote = ""
    signs = iter(grammar)
    for sign in signs:
        if sign == "\\":
            next(signs, None)
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
            if depth > MAX_GROUPS:
                return f"has groups nested deeper than {MAX_GROUPS} levels"
        elif sign in ")]}":
            depth = max(0, depth - 1)
    return None


# -- media -------------------------------------------------------------------------------------------------


def check_media(body: Mapping[str, Any], *, is_ours: bool, at: str = "") -> None:
    """Refuse pictures, sounds and films that the engine would fetch from inside this machine or its network.

    Parameters
    ----------
    body
        A request, as parsed.
    is_ours
        Whether the engine runs on this machine: then only data URLs are taken. A remote endpoint fetches what
        ``http(s)`` names from where it is.
    at
        Where the body stands in the request, for the path of the error.

    Raises
    ------
    DoesNotFit
    """
    for name in ("messages", "input"):
        value = body.get(name)
        if isinstance(value, list):
            for path, address in _addresses(value, (name, (at, _NO_PATH) if at else _NO_PATH)):
                scheme = address[:8].lower() if isinstance(address, str) else ""
                if not scheme.startswith(("data:",) if is_ours else ("data:", "http:", "https:")):
                    raise _refused(
                        path,
                        "must be a data URL: the engine fetches nothing"
                        if is_ours
                        else "must be an http(s) or data URL",
                        "Send what is in the file: data:image/png;base64,...",
                    )


def _addresses(found: list[Any], path: Path) -> Iterator[tuple[Path, Any]]:
    """Give every address of a file in messages, and what stands in the place of one, with where it is."""
    stack: list[tuple[Any, Path]] = [(found, path)]
    while stack:
        value, path = stack.pop()
        if isinstance(value, list):
            stack.extend((inner, (at, path)) for at, inner in enumerate(value) if isinstance(inner, dict | list))
            continue
        for key, inner in value.items():
            if key in _ADDRESSES:
                named = inner.get("url") if isinstance(inner, dict) else inner
                if named is not None:
                    yield (key, path), named
            elif key in _OBJECTS and inner is not None:
                yield (key, path), inner
            elif isinstance(inner, dict | list):
                stack.append((inner, (key, path)))
