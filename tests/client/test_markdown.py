"""What a model writes loads nothing in a notebook: asked of programs that show Markdown, with HTML allowed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import mistune
import pytest
from markdown_it import MarkdownIt
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from llmkit.client import Answer
from llmkit.client.markdown import harmless
from llmkit.schemas import Timings

MARKDOWN_IT = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PROGRAMS: dict[str, Callable[[str], str]] = {
    "markdown-it": MARKDOWN_IT.render,
    "mistune": lambda text: str(mistune.create_markdown(escape=False, plugins=["table", "footnotes", "math"])(text)),
    "nbconvert": markdown2html_mistune,
}
LOADS = re.compile(
    r"<(?:img|image|svg|iframe|video|audio|source|script|object|embed|link|style|input)\b", re.IGNORECASE
)

PICTURE = "![a](http://127.0.0.1:9/a.png)"
HTML = "<img src=http://127.0.0.1:9/a.png>"
ATTACKS = [
    PICTURE,
    HTML,
    "![a][b]\n\n[b]: http://127.0.0.1:9/a.png",
    "![b]\n\n[b]: http://127.0.0.1:9/a.png",
    rf"\\{HTML} \{HTML} \!{PICTURE} \\{PICTURE}",
    f"~~~\n```\n~~~\n{PICTURE}\n{HTML}\n```",
    f"```\n~~~\n```\n{HTML}\n~~~",
    f"````\n```\n````\n{HTML}\n```",
    f"| a | b |\n|---|---|\n| `x | {PICTURE}` |",
    f"\\`{HTML}`",
    f"``\\\\(`` `\\\\)` `{PICTURE}`",
    f"$`$ {HTML} `a`",
    f'[a]: u "\n```\n"\n{HTML}\n```\n',
    f"<!--\n```\n-->\n{HTML}\n```",
    f"<pre>\n\n```\n</pre>{HTML}\n```",
    f"> ```\n{HTML}\n> ```",
    f"1. ```html\n   {HTML}\n   ```\n{HTML}",
    f"a `b\n`{HTML}`",
    f"```html {HTML}\nx\n```",
    f"\r```\r{HTML}\r```\r{HTML}",
    "<svg><image href=http://127.0.0.1:9/a.png></svg><script>1</script>",
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_of_an_answer_is_loaded(text: str, program: str) -> None:
    made = PROGRAMS[program](harmless(text))
    assert not LOADS.search(made), made


def test_the_programs_would_load_it() -> None:
    for show in PROGRAMS.values():
        assert LOADS.search(show(PICTURE))
        assert LOADS.search(show(HTML))


def test_nothing_is_loaded_whatever_the_pieces_are_put_together_to() -> None:
    dice = random.Random(7)
    pieces = [
        PICTURE,
        HTML,
        "`",
        "``",
        "```",
        "~~~",
        "\n",
        "\n\n",
        "\\",
        "|",
        "$",
        "$$",
        "\\\\(",
        "\\\\)",
        "> ",
        "- ",
        "    ",
    ]
    pieces += [
        "[a]: u",
        '"',
        "[",
        "]",
        "(",
        ")",
        "<!--",
        "-->",
        "<pre>",
        "!",
        "a ",
        "|---|---|",
        "\\begin{x}",
        "\\end{x}",
    ]
    for _ in range(1500):
        text = "".join(dice.choices(pieces, k=dice.randint(2, 24)))
        for name, show in PROGRAMS.items():
            made = show(harmless(text))
            assert not LOADS.search(made), (name, text, made)


def test_what_loads_nothing_stays_as_it_is() -> None:
    for text in (
        "**Paris** is it.",
        "a < b, `x[1]`!",
        "```cpp\nint a = 1;\n```\n$x^2$ [a](http://b)",
    ):
        assert harmless(text) == text
    answer = Answer(
        response="Paris",
        model_id="m",
        request_id="r",
        finish_reason="stop",
        usage=None,
        timings=Timings.model_construct(),
    )
    assert answer._repr_markdown_() == "Paris"


def test_code_stays_code_beside_a_picture() -> None:
    code = "#include <stdio.h>\nvec![1](x) `a` ```b``` $HOME \\\\"
    made = MARKDOWN_IT.render(harmless(f"Use `vec![1]`:\n\n  ```cpp\n{code}\n  ```\n\n{PICTURE}"))
    assert "<code>vec![1]</code>" in made
    assert '<code class="language-cpp">#include &lt;stdio.h&gt;\nvec![1](x) `a` ```b``` $HOME \\\\\n</code>' in made
    assert "![a](http://127.0.0.1:9/a.png)" in made  # as it was written


def test_a_diagram_is_shown_as_its_text() -> None:
    made = harmless('```mermaid\nA@{ img: "http://127.0.0.1:9/a.png" }\n```')
    assert made.strip().splitlines()[0] == "```"
    assert "A@{ img:" in made
