"""Markdown of a model as a notebook may show it: nothing is loaded from elsewhere, and nothing runs.

A picture in an answer would tell its owner that somebody reads it, and could carry what the prompt said along.
Notebooks show Markdown with many programs, which differ about where code begins and ends. So a text with something that
could load is written anew, in the little about which they agree: blocks of code between fences of their own, short code
within a line, and everywhere else no mark that would make a picture, HTML or a block of code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_COULD_LOAD = re.compile(r"!\[|<[A-Za-z/!?]|mermaid", re.IGNORECASE)
"""Pictures, HTML, and diagrams, whose labels may hold pictures."""
_FENCE = re.compile(r"[ \t]{0,12}(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[A-Za-z0-9+#.\-]{0,30})[^`~\n]*")
# Nothing that a table, a formula or an escape could cut.
_CODE = re.compile(r"(?<![\\`])`([^`|\\$\n]+)`(?!`)")
# As entities: these are letters to every program, whatever stands before them.
_MARKS = re.compile(r"<(?=[A-Za-z/!?])|(?<=!)\[|`|~(?=~)|\$|(?<=\]):|\\(?=\\|begin|end)|(?<=\\)\\")


def harmless(markdown: str) -> str:
    r"""Take out of a Markdown text what would load something; pictures become links, HTML is shown as it is written.

    Parameters
    ----------
    markdown
        What a model has written, also the beginning of it.

    Returns
    -------
    str
        The same text if there is no such thing in it.

    Examples
    --------
    >>> harmless("**Paris** `<b>`: see [a map](https://example.org/map)") == "**Paris** `<b>`: see [a map](https://example.org/map)"
    True
    >>> harmless("![a map](https://example.org/map.png)")
    '!&#91;a map](https://example.org/map.png)'
    """
    return "\n".join(_written_anew(markdown)) if _COULD_LOAD.search(markdown) else markdown


def _written_anew(markdown: str) -> Iterator[str]:
    lines = iter(re.split(r"\r\n|\r|\n", markdown))
    for line in lines:
        opening = _FENCE.fullmatch(line)
        if opening is None:
            yield _prose(line)
            continue
        code = list(_until_closed(lines, opening["fence"]))
        longest = max((len(run) for run in re.findall("`+", "\n".join(code))), default=0)
        fence = "`" * max(3, longest + 1)
        language = opening["language"]
        # Blank lines keep the block apart from whatever stands around it.
        yield from ("", fence + ("" if language.lower() == "mermaid" else language), *code, fence, "")


def _until_closed(lines: Iterator[str], fence: str) -> Iterator[str]:
    closing = re.compile(rf"[ \t]*{fence[0]}{{{len(fence)},}}[ \t]*")
    for line in lines:
        if closing.fullmatch(line):
            return
        yield line


def _prose(line: str) -> str:
    parts = _CODE.split(line)  # prose, code, prose, ...
    return "".join(f"`{part}`" if at % 2 else _MARKS.sub(_entity, part) for at, part in enumerate(parts))


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"
