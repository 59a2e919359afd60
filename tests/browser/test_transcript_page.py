"""The transcript alone in a page: its real module, the kernel's real side, and a stand-in for what is between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route

from llmkit.panel.transcript import STATIC, Transcript, Turn

pytestmark = pytest.mark.browser

SCREENSHOTS = Path(__file__).parent / "screenshots"
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
STYLES = "\n".join(file.read_text() for file in sorted(STATIC.glob("*.css"), key=lambda file: file.stem != "panel"))
LIGHT = """--jp-layout-color0: white; --jp-layout-color1: white; --jp-layout-color2: #eee; --jp-border-color2: #e0e0e0;
  --jp-ui-font-color1: rgba(0,0,0,.87); --jp-ui-font-color2: rgba(0,0,0,.54); --jp-content-font-color0: black;
  --jp-content-font-color1: rgba(0,0,0,.87); --jp-brand-color1: #1976d2; --jp-error-color1: #d32f2f;
  --jp-content-link-color: #1976d2; --jp-cell-editor-background: #f5f5f5;"""
DARK = """--jp-layout-color0: #111; --jp-layout-color1: #212121; --jp-layout-color2: #424242;
  --jp-border-color2: #616161; --jp-ui-font-color1: white; --jp-ui-font-color2: rgba(255,255,255,.7);
  --jp-content-font-color0: white;
  --jp-content-font-color1: white; --jp-brand-color1: #42a5f5; --jp-error-color1: #ef5350;
  --jp-content-link-color: #64b5f6; --jp-cell-editor-background: #212121;"""
FONTS = """--jp-content-font-family: sans-serif; --jp-ui-font-family: sans-serif; --jp-code-font-family: monospace;
  --jp-content-font-size1: 14px; --jp-ui-font-size1: 13px; --jp-code-font-size: 13px;"""
HTML = """<!doctype html><meta charset="utf-8"><style>:root {{ {theme} {fonts} }} body {{ margin: 16px;
  background: var(--jp-layout-color1); }} {styles}</style>
<div class="llmkit-panel"><div class="llmkit-tab" id="place"></div></div>
<script type="module">
  import start from "./module.js";
  window.define = Object.assign(() => {{ throw new Error("AMD was asked"); }}, {{ amd: {{}} }});
  const listeners = {{}};
  window.state = {{ placeholder: "Nothing yet.", compact: false }};
  window.sent = [];
  const model = {{
    get: (name) => state[name],
    set: (name, value) => {{ state[name] = value; listeners[`change:${{name}}`]?.forEach((call) => call()); }},
    on: (name, call) => (listeners[name] ??= new Set()).add(call),
    off: (name, call) => listeners[name]?.delete(call),
    send: (content) => sent.push(content),
  }};
  window.model = model;
  window.receive = (message) => listeners["msg:custom"]?.forEach((call) => call(message));
  const widget = start();
  window.view = () => {{
    const el = document.createElement("div");
    document.getElementById("place").append(el);
    return widget.render({{ model, el }});
  }};
  widget.initialize({{ model }});
  view();
  window.ready = true;
</script>"""


INSIDE = "\nwindow.inside = { makeBody, markdown, elementsOf, element };"  # what the module keeps to itself


class Stage:
    """A page with the widget, and the kernel's side of it in this process."""

    def __init__(self, page: Page, *, theme: str = LIGHT, origin: str = "https://llmkit.example/") -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.transcript = Transcript()
        self.transcript.send = self._send
        self.lost = 0  # how many messages the connection still loses
        html = HTML.format(theme=theme, fonts=FONTS, styles=STYLES)

        def serve(route: Route) -> None:
            script = route.request.url.endswith("module.js")
            kind, body = ("text/javascript", self.transcript._esm + INSIDE) if script else ("text/html", html)
            route.fulfill(content_type=kind, body=body)

        page.unroute_all()
        page.route(f"{origin}**", serve)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(origin)
        self.greet()

    def _send(self, message: dict[str, Any]) -> None:
        if self.lost:
            self.lost -= 1
            return
        self.page.evaluate("message => receive(message)", message)

    def greet(self) -> None:
        """Hand what the page said to the kernel."""
        self.page.wait_for_function("window.ready")
        for content in self.page.evaluate("sent.splice(0)"):
            self.transcript._greeted(None, content, None)
        self.settle()

    def reload(self) -> None:
        """Load the page again; the kernel's side lives on."""
        self.page.reload()
        self.greet()

    def settle(self) -> None:
        """Wait until everything is painted."""
        self.page.evaluate("""() => new Promise((done) => {
          let left = 9;
          const wait = () => left-- ? requestAnimationFrame(wait) : done();
          wait();
        })""")

    def answer(self, text: str, *, pieces: int = 7, end: bool = True, **how: Any) -> None:
        """Stream an answer, so many characters at a time."""
        self.transcript.begin("demo", "What?")
        for start in range(0, len(text), pieces):
            self.transcript.append(text[start : start + pieces])
        if end:
            self.transcript.end("7 tokens · 0.4 s", **how)
        self.settle()

    def body(self, turn: int = -1) -> str:
        """Give the HTML of an answer."""
        bodies: list[str] = self.page.evaluate("[...document.querySelectorAll('.llmkit-body')].map(b => b.innerHTML)")
        return bodies[turn]


@pytest.fixture
def stage(page: Page) -> Stage:
    page.set_default_timeout(5000)
    return Stage(page)


MARKDOWN = """# The title

Some *words* and **more**, `code` and a [link](https://example.org/a?b=c). See https://example.com/x too.

1. one
2. two
   - nested
   - list

> A quote
> of two lines

| Name | Count |
| :--- | ----: |
| one  | 1     |
| two  | 22    |

```python
def add(a, b):
    return a + b  # <b>
```

Setext
======

- loose

- items

***
The end, ~~struck~~.
"""


def test_an_answer_is_markdown_and_the_same_however_it_came(stage: Stage) -> None:
    stage.answer(MARKDOWN)
    streamed = stage.body()
    body = stage.page.locator(".llmkit-body")
    assert body.locator("h1").all_inner_texts() == ["The title", "Setext"]
    assert body.locator("em").inner_text() == "words"
    assert body.locator("strong").inner_text() == "more"
    assert body.locator("ol > li").count() == 2
    assert body.locator("ol ul > li").all_inner_texts() == ["nested", "list"]
    assert body.locator("blockquote").inner_text() == "A quote\nof two lines"
    assert body.locator("table th").all_inner_texts() == ["Name", "Count"]
    assert body.locator("td.llmkit-right").all_inner_texts() == ["1", "22"]
    assert body.locator(".llmkit-code-language").inner_text() == "python"
    assert body.locator(".llmkit-code code").inner_text() == "def add(a, b):\n    return a + b  # <b>"
    assert body.locator("hr").count() == 1
    assert body.locator("s").inner_text() == "struck"
    for link in body.locator("a").all():
        assert link.get_attribute("target") == "_blank"
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    hrefs = [link.get_attribute("href") for link in body.locator("a").all()]
    assert hrefs == ["https://example.org/a?b=c", "https://example.com/x"]

    for pieces in (1, 3, 50, 10_000):
        stage.answer(MARKDOWN, pieces=pieces)
        assert stage.body() == streamed
    stage.transcript.show([Turn("demo", "What?", text=MARKDOWN, state="done")])
    stage.settle()
    assert stage.body() == streamed
    assert stage.page.evaluate("typeof markdownit") == "undefined"
    assert stage.problems == []


def test_markdown_that_only_its_next_line_explains_is_right_at_the_end(stage: Stage) -> None:
    for text in (
        "para\n***bold and italic***\n",
        "a | b\n--- | ---\n1 | 2\n\nend",
        "intro\na | b\n--- | ---foo\nmore\n",
        "1. a\n\n2. b\n\n10) c\n",
        "- a\n\n  still a\n\n- b\n",
        "x\n-\n\ny\n--- \nz",
        "[late][1] and [other]\n\nwords\n\n[1]: https://example.org/late\n[other]: https://example.org/other\n",
        "```\nnever closed\n\n# no title\n",
        "    indented\n\n    code\n\nwords",
        "a\r\nb\r\n\r\nc\rd",
        "**a**\n**b** *c* `d`\n- **x**\n  *y*\n",
    ):
        stage.answer(text, pieces=1)
        streamed = stage.body()
        stage.answer(text, pieces=100_000)
        assert stage.body() == streamed, text
    assert stage.page.locator("a").count() == 2 * 2
    assert stage.problems == []


LINES = (
    "para;**bold** x;***both***;***;---;--;-;=;===;- a;- b;  - n;+ p;* s;*;1. one;2. two;2) alt;10. ten;    code;  in;"
    "> q;> - ql;lazy;# h;## ;```;```py;~~~;a | b;--- | ---;|---|---|;1 | 2;[r]: http://x.y/z;[r] and [q];\t- tab;`c`;"
    "<div>;![i](http://a/b.png);- [ ] t;https://e.com/x;;;;;;"
)
CUT = """([lines, count]) => {
  const { makeBody, markdown, elementsOf, element } = inside;
  let seed = 7;
  const random = (below) => {
    seed = (Math.imul(seed ^ (seed >>> 15), 0x2c1b3c6d) + 0x9e3779b9) | 0;
    return ((seed ^ (seed >>> 13)) >>> 0) % below;
  };
  const wrong = [];
  for (let at = 0; at < count; at += 1) {
    const text = Array.from({ length: 2 + random(9) }, () => lines[random(lines.length)]).join("\\n");
    const whole = element("div"), streamed = element("div"), show = makeBody(streamed), env = { references: {} };
    whole.append(...elementsOf(markdown.parse(text, env), text, env));
    for (let end = 1; end <= text.length; end += 1) show(text.slice(0, end), false);
    show(text, true);
    if (streamed.innerHTML !== whole.innerHTML) wrong.push([text, streamed.innerHTML, whole.innerHTML]);
  }
  return wrong;
}"""


def test_any_markdown_is_the_same_in_pieces_as_in_one(stage: Stage) -> None:
    assert stage.page.evaluate(CUT, [LINES.split(";"), 600]) == []


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1><style>body { display: none }</style>",
    "<style>body { display: none }</style>",
    "<iframe src='https://leak.example/frame'></iframe>",
    "<p id=place style='position: fixed' onclick='window.hacked = 1'>hi</p>",
    "[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](java\tscript:window.hacked=1)",
    "[d](&#106;avascript:window.hacked=1) [e](javascript&colon;window.hacked=1) [f](<\x01javascript:window.hacked=1>)",
    "[g](vbscript:msgbox) [h](data:text/html,<script>window.hacked=1</script>) [i](data:text/html;base64,PHNjcmlwdD4=)",
    "[j]( javascript:window.hacked=1 ) <javascript:window.hacked=1> [k]\n\n[k]: javascript:window.hacked=1",
    "[l](/lab?reset) [m](lab) [n](#place) [o](//leak.example) [p](file:///etc/passwd) [q](blob:https://x.example/1)",
    "![remote](https://leak.example/pixel.png) ![also](//leak.example/2.png) ![*three*](http://leak.example/3.gif 't')",
    f"![svg](data:image/svg+xml;base64,PHN2Zz4=) ![raster]({PIXEL}) [raster link]({PIXEL})",
    "[![in a link](https://leak.example/4.png)](javascript:window.hacked=1)",
    '![x](data:image/png;base64,AAAA" onerror="window.hacked=1) ["t"](https://ok.example "\\"onclick=window.hacked=1")',
    '``` "onclick=window.hacked=1\ncode\n```',
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]8;;https://leak.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J \x9b31m back\x08space \x00",
]
SAFE = """() => {
  const allowed = {A: ['href', 'title', 'target', 'rel'], IMG: ['alt', 'src'], OL: ['start'], TH: ['class', 'scope'],
    TD: ['class'], DIV: ['class', 'tabindex', 'role', 'aria-label'], SPAN: ['class'], PRE: ['tabindex'],
    BUTTON: ['class', 'type', 'aria-label']};
  const plain = 'P H1 H2 H3 H4 H5 H6 UL LI TABLE THEAD TBODY TR CODE EM STRONG S BLOCKQUOTE HR BR'.split(' ');
  return [...document.querySelectorAll('.llmkit-body *')].flatMap((node) => [
    ...(node.tagName in allowed || plain.includes(node.tagName) ? [] : [node.tagName]),
    ...[...node.attributes].filter((a) => !(allowed[node.tagName] ?? []).includes(a.name)).map((a) => a.name),
    ...(node.tagName === 'A' && !/^(https?|mailto):/.test(node.href) ? [node.href] : []),
    ...(node.tagName === 'IMG' && !node.src.startsWith('data:image/png;') ? [node.src] : []),
    ...(node.className && !/^(llmkit-[a-z-]+ ?)+$/.test(node.className) ? [node.className] : []),
  ]);
}"""
SIDEWAYS = """() => [...document.querySelectorAll('html, .llmkit-transcript, .llmkit-turns, .llmkit-turn')]
  .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.className || 'page')"""


def test_what_is_hostile_stays_inert(stage: Stage) -> None:
    stage.requests.clear()
    for pieces in (1, 100_000):
        stage.answer("\n\n".join(HOSTILE), pieces=pieces)
    for text in HOSTILE:
        stage.transcript.begin(text, text, [text, "data:image/svg+xml;base64,PHN2Zz4=", "https://leak.example/5.png"])
        stage.transcript.append(text, text)
        stage.transcript.end(text, "failed", [{"function": {"name": text, "arguments": text}}])
    stage.settle()
    assert stage.page.evaluate(SAFE) == []
    assert stage.page.locator(".llmkit-transcript :is(script, iframe, svg, style)").count() == 0
    assert stage.page.evaluate("window.hacked") is None
    assert [url for url in stage.requests if not url.startswith("data:image/png")] == []
    assert stage.page.locator(".llmkit-transcript").first.is_visible()
    body = stage.page.locator(".llmkit-body").first
    shown = body.inner_text()
    assert "<script>window.hacked = 1</script>" in shown
    assert "red link" in re.sub(r" +", " ", shown)
    everything = stage.page.locator(".llmkit-transcript").first.text_content() or ""
    assert not re.search(r"\x1b|\[31m|\[2J|\x08|\x00", everything)
    assert body.locator("img").count() == 1
    assert "https://leak.example/pixel.png" in [link.get_attribute("href") for link in body.locator("a").all()]
    assert body.locator("a", has_text="three").get_attribute("href") == "http://leak.example/3.gif"
    assert stage.problems == []


def test_what_is_huge_stays_in_its_box(stage: Stage) -> None:
    deep = "\n".join(f"{'  ' * level}- level {level}" for level in range(200))
    table = "\n".join(("|" + f" {cell} |" * 500) for cell in ("head", "---", "one", "two"))
    for text, seen in (
        ("x" * 20_000, "x" * 20_000),
        (deep, "level 199"),
        ("\n".join(f"{'  ' * level}- level {level}" for level in range(25)), "level 24"),
        ("> " * 150 + "in there", "in there"),
        (table, "two"),
        ("```\n" + "y" * 20_000 + "\nnever closed", "never closed"),
        ("`" + "z" * 20_000 + "`", "z" * 20_000),
        ("[" * 20_000, "[" * 20_000),
        ("# " + "h" * 20_000, "h" * 20_000),
    ):
        stage.answer(text, pieces=5_000)
        assert seen in (stage.page.locator(".llmkit-body").last.text_content() or "")
        for width in (1200, 300):
            stage.page.set_viewport_size({"width": width, "height": 900})
            stage.settle()
            assert stage.page.evaluate(SIDEWAYS) == [], text[:40]
    assert stage.page.evaluate(
        "(() => { const t = document.querySelector('.llmkit-table'); return t.scrollWidth > t.clientWidth; })()"
    )
    assert stage.problems == []


def test_one_enormous_block_is_plain_text_from_there_on(stage: Stage) -> None:
    code = "# first\n\n```\n" + "x = 1\n" * 12_000 + "```\n\nlast\n"
    for pieces in (10_000, 1_000_000):
        stage.answer(code, pieces=pieces)
        body = stage.page.locator(".llmkit-body").last
        assert body.locator("h1").inner_text() == "first"
        assert body.locator(".llmkit-code").count() == 0
        assert body.locator(".llmkit-plain").count() > 3
        text = "".join(body.locator(".llmkit-plain").all_text_contents())
        assert text.replace("\n", "") == code.removeprefix("# first\n\n").replace("\n", "")
    assert stage.problems == []


PARAGRAPH = "The **quick** brown fox jumps over the `lazy` dog, and *then* it goes on and on, as answers do. "
SECTION = (
    f"## A part\n\n{PARAGRAPH * 4}\n\n- one {PARAGRAPH}\n- two {PARAGRAPH}\n- three\n\n```python\n"
    + ("for number in range(10):\n    print(number)\n" * 8)
    + "```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n| 3 | 4 |\n\n"
)
STREAM = """async (tokens) => {
  const body = () => document.querySelector('.llmkit-turn:last-child .llmkit-body');
  const painted = [], frames = [];
  const raf = window.requestAnimationFrame;
  window.requestAnimationFrame = (call) => raf((time) => {
    const start = performance.now(); call(time); painted.push(performance.now() - start);
  });
  const frame = () => new Promise((done) => raf(done));
  let rebuilt = 0;
  const finished = new WeakSet();
  const seen = new MutationObserver((records) => {
    for (const record of records) {
      let top = record.target;
      while (top && top.parentNode !== body()) top = top.parentNode;
      if (top && finished.has(top)) rebuilt += 1;
      for (const gone of record.removedNodes) if (finished.has(gone)) rebuilt += 1;
    }
    // All but the last three are finished for sure: one is open, one may wait for its next line.
    [...body().children].slice(0, -3).forEach((node) => finished.add(node));
  });
  seen.observe(body(), { childList: true, subtree: true, characterData: true, attributes: true });
  let number = window.lastNumber;
  let before = performance.now();
  const started = before;
  for (let at = 0; at < tokens.length; at += 1) {
    receive({ type: 'append', number: ++number, text: tokens[at] });
    if (at % 20 === 19) {
      await frame();
      frames.push(performance.now() - before);
      before = performance.now();
    }
  }
  receive({ type: 'end', number: ++number, state: 'done', note: 'all of it', tool_calls: [] });
  await frame();
  seen.takeRecords();
  seen.disconnect();
  window.requestAnimationFrame = raf;
  frames.sort((a, b) => a - b);
  return { rebuilt, finished: [...body().children].filter((node) => finished.has(node)).length,
    seconds: (performance.now() - started) / 1000, paint: painted.reduce((a, b) => a + b, 0),
    longestPaint: Math.max(...painted), longestFrame: frames.at(-1), median: frames[frames.length >> 1],
    count: frames.length };
}"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("parts", SECTION * 45),
        ("one paragraph", PARAGRAPH * 400),
        ("one code block", "```python\n" + "for number in range(10):\n    print(number)\n" * 900),
        ("one list", f"- {PARAGRAPH}\n" * 400),
    ],
)
def test_ten_thousand_tokens_stay_smooth(stage: Stage, name: str, text: str) -> None:
    tokens = [text[start : start + 4] for start in range(0, len(text), 4)][:10_000]
    stage.transcript.begin("demo", "Count")
    stage.page.evaluate("number => { window.lastNumber = number; }", stage.transcript._number)
    result = stage.page.evaluate(STREAM, tokens)
    print(
        f"{name}: {len(tokens)} tokens in {result['seconds']:.1f} s and {result['count']} frames: "
        f"{result['paint']:.0f} ms of painting, {result['longestPaint']:.0f} ms the longest; "
        f"frames of {result['median']:.0f} ms, {result['longestFrame']:.0f} ms the longest"
    )
    assert result["rebuilt"] == 0
    if name == "parts":
        assert result["finished"] > 60
    assert result["paint"] < result["seconds"] * 1000 * 0.6
    streamed = stage.body()
    stage.transcript.show([Turn("demo", "Count", text="".join(tokens), state="done")])
    stage.settle()
    assert stage.body() == streamed


def test_the_first_piece_is_there_at_once_and_only_the_end_is_followed(stage: Stage) -> None:
    stage.transcript.begin("demo", "What?")
    stage.page.evaluate(
        "number => { receive({ type: 'append', number, text: 'First' });"
        "  window.atOnce = document.querySelector('.llmkit-body').innerText; }",
        stage.transcript._number + 1,
    )
    assert stage.page.evaluate("atOnce") == "First"
    stage.transcript._number += 1
    for number in range(60):
        stage.transcript.append(f"\n\nParagraph {number}")
    stage.settle()
    at_end = """(() => {
      const box = document.querySelector('.llmkit-transcript');
      return box.scrollHeight - box.scrollTop - box.clientHeight;
    })()"""
    assert stage.page.evaluate(at_end) < 2
    for compact in ("true", "false"):  # the end is further away before the page hears of its own scrolling
        stage.transcript.begin("demo", "What?\n" * 5)
        stage.page.evaluate(f"model.set('compact', {compact})")
        stage.settle()
        assert stage.page.evaluate(at_end) < 2
    stage.page.locator(".llmkit-transcript").hover()
    stage.page.mouse.wheel(0, -60)
    stage.page.wait_for_timeout(300)
    top = stage.page.evaluate("document.querySelector('.llmkit-transcript').scrollTop")
    stage.transcript.append("\n\nmore\n\nand more")
    stage.settle()
    assert stage.page.evaluate("document.querySelector('.llmkit-transcript').scrollTop") == top
    stage.page.mouse.wheel(0, 10_000)
    stage.page.wait_for_timeout(300)
    stage.transcript.append("\n\nmore\n\nand more")
    stage.settle()
    assert stage.page.evaluate(at_end) < 2


def test_nothing_around_it_moves(stage: Stage) -> None:
    view = stage.page.locator(".llmkit-transcript-view")
    before = view.bounding_box()
    stage.transcript.begin("demo", "What?")
    row = "document.querySelector('.llmkit-turn-row').getBoundingClientRect().height"
    height = stage.page.evaluate(row)
    stage.transcript.append("Yes.")
    stage.transcript.end("1 token · 0.1 s")
    stage.settle()
    assert stage.page.evaluate(row) == height
    for _ in range(10):
        stage.answer(MARKDOWN, pieces=100)
    assert view.bounding_box() == before


def test_thoughts_are_a_fold_that_closes_when_the_answer_begins(stage: Stage) -> None:
    stage.transcript.begin("demo", "What?")
    stage.transcript.append(reasoning="**Let** me <b>see</b>. ")
    stage.settle()
    fold = stage.page.locator(".llmkit-thoughts")
    assert fold.locator("summary").inner_text() == "Thinking …"
    assert fold.locator(".llmkit-thoughts-text").inner_text().strip() == "**Let** me <b>see</b>."
    stage.transcript.append(reasoning="And so on.")
    stage.transcript.append("It is **so**.")
    stage.settle()
    assert fold.locator("summary").inner_text() == "Thought for a while (6 words)"
    assert fold.get_attribute("open") is None
    fold.locator("summary").click()
    stage.transcript.append(" And more.")
    stage.transcript.end("done")
    stage.settle()
    assert fold.get_attribute("open") is not None  # as the reader left it
    assert "<b>see</b>. And so on." in fold.inner_text()


def test_tool_calls_and_pictures_are_shown(stage: Stage) -> None:
    stage.transcript.begin("demo", "What is in these?", [PIXEL, "data:image/svg+xml;base64,PHN2Zz4="])
    stage.transcript.append("Let me look.")
    calls: list[dict[str, Any]] = [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"place": "<b>here</b>", "n": 2}'}},
        {"name": "guess", "arguments": "{not json"},
    ]
    stage.transcript.end("done", tool_calls=calls)
    stage.settle()
    tools = stage.page.locator(".llmkit-tool")
    assert tools.locator("code").all_inner_texts() == ["look", "guess"]
    assert tools.locator("pre").all_inner_texts() == ['{\n  "place": "<b>here</b>",\n  "n": 2\n}', "{not json"]
    thumbs = stage.page.locator(".llmkit-question img")
    assert thumbs.count() == 1
    assert thumbs.get_attribute("alt") == "Image 1 of the prompt"


@pytest.mark.parametrize("origin", ["https://llmkit.example/", "http://llmkit.example/"])
def test_an_answer_and_its_code_can_be_copied(page: Page, origin: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin="https://llmkit.example/")
    stage = Stage(page, origin=origin)
    assert page.evaluate("isSecureContext") == origin.startswith("https")
    page.evaluate("addEventListener('copy', () => { window.copied = getSelection().toString(); })")
    stage.answer("Some **words**:\n\n```js\nlet x;\n```\n")

    def copied() -> str:
        return str(page.evaluate("window.isSecureContext ? navigator.clipboard.readText() : window.copied"))

    page.get_by_role("button", name="Copy the answer of demo").click()
    page.locator(".llmkit-copy", has_text="Copied").wait_for()
    assert copied() == "Some **words**:\n\n```js\nlet x;\n```\n"
    code = page.get_by_role("button", name="Copy code")
    code.focus()
    page.keyboard.press("Enter")
    page.locator(".llmkit-copy-code", has_text="Copied").wait_for()
    assert copied() == "let x;"
    assert page.evaluate("document.activeElement.className").endswith("llmkit-copy-code")
    page.locator(".llmkit-copy-code", has_text=re.compile("^Copy$")).wait_for()
    assert page.locator("textarea").count() == 0
    assert stage.problems == []


def test_a_reload_and_a_second_view_show_the_same(stage: Stage) -> None:
    stage.answer(MARKDOWN)
    stage.answer(MARKDOWN[:150], end=False)
    before = [stage.body(0), stage.body(1)]
    stage.reload()
    assert [stage.body(0), stage.body(1)] == before
    assert stage.page.locator(".llmkit-streaming").count() == 1

    stage.page.evaluate("() => { window.leave = view(); }")
    stage.settle()
    assert [stage.body(2), stage.body(3)] == before
    stage.transcript.append(MARKDOWN[150:])
    stage.transcript.end("done")
    stage.settle()
    assert [stage.body(index) for index in range(4)] == [before[0]] * 4
    stage.page.evaluate("leave()")
    stage.transcript.append("late")
    stage.answer("And on.")
    assert stage.page.locator(".llmkit-body", has_text="And on.").count() == 1
    stage.transcript.clear()
    stage.settle()
    assert stage.page.locator(".llmkit-transcript").first.inner_text() == "Nothing yet."
    assert stage.problems == []


def test_another_page_that_asks_disturbs_nobody_and_what_was_lost_is_asked_for(stage: Stage) -> None:
    stage.answer("First.", end=False)
    stage.page.evaluate("() => { window.node = document.querySelector('.llmkit-turn'); }")
    stage.transcript._greeted(None, {"type": "hello", "page": "another"}, None)
    stage.transcript.append(" Second.")
    stage.settle()
    assert stage.page.evaluate("node.isConnected && node.querySelector('.llmkit-body').innerText") == "First. Second."
    assert stage.page.evaluate("sent") == []

    stage.lost = 2
    stage.transcript.append(" Third.")
    stage.transcript.append(" Fourth.")
    stage.transcript.append(" Fifth.")
    assert stage.page.evaluate("sent.length") == 1
    stage.greet()
    stage.transcript.append(" Sixth.")
    stage.settle()
    assert "First. Second. Third. Fourth. Fifth. Sixth." in stage.body()


def test_old_turns_leave_the_page(stage: Stage) -> None:
    for number in range(103):
        stage.transcript.begin("demo", f"Question {number}")
        stage.transcript.end("done")
    stage.settle()
    questions = stage.page.locator(".llmkit-question").all_inner_texts()
    assert questions == [f"Question {number}" for number in range(3, 103)]
    before = stage.page.locator(".llmkit-turns").inner_html()
    stage.reload()
    assert stage.page.locator(".llmkit-turns").inner_html() == before


def test_it_is_told_to_who_does_not_see_it(stage: Stage) -> None:
    log = stage.page.get_by_role("log", name="Answers")
    said = stage.page.get_by_role("status")
    stage.answer("Words.", end=False)
    assert log.get_attribute("aria-busy") == "true"
    assert said.inner_text() == ""
    stage.transcript.end("1 token")
    assert log.get_attribute("aria-busy") == "false"
    assert said.inner_text() == "demo has answered. 1 token"
    stage.answer("More.", state="failed")
    assert stage.page.get_by_role("alert").inner_text() == "7 tokens · 0.4 s"
    assert said.inner_text() == ""
    stage.answer("More.", state="stopped")
    assert stage.page.get_by_role("alert").count() == 1


def test_ctrl_enter_sends_once_in_its_own_tab(stage: Stage) -> None:
    stage.page.evaluate("""() => {
      view();
      window.clicks = [];
      for (const name of ['place', 'other']) {
        const tab = document.getElementById(name) ?? document.createElement('div');
        tab.className = 'llmkit-tab';
        const prompt = document.createElement('div');
        prompt.className = 'llmkit-user-prompt';
        prompt.append(document.createElement('textarea'));
        const send = document.createElement('button');
        send.className = 'llmkit-send';
        send.onclick = () => clicks.push(name);
        tab.append(prompt, send);
        if (name === 'other') document.querySelector('.llmkit-panel').prepend(tab);
      }
    }""")
    field = stage.page.locator("#place .llmkit-user-prompt textarea")
    field.press("Control+Enter")
    assert stage.page.evaluate("clicks") == ["place"]
    field.press("Enter")
    stage.page.locator("textarea").first.press("Control+Enter")  # a tab without a transcript is not ours
    assert stage.page.evaluate("clicks") == ["place"]


def test_the_compact_one_has_no_question_and_fills_its_column(stage: Stage) -> None:
    stage.answer("Words.")
    stage.page.evaluate("""() => {
      const flex = { display: 'flex', flexDirection: 'column', height: '500px' };
      Object.assign(document.getElementById('place').style, flex);
      model.set('compact', true);
    }""")
    assert not stage.page.locator(".llmkit-question").is_visible()
    box = stage.page.locator(".llmkit-transcript").bounding_box()
    assert box is not None
    assert box["height"] == 500


def fill(stage: Stage) -> None:
    stage.transcript.begin("gpt-oss-20b", "What can you show me? <b>not bold</b>", [PIXEL])
    stage.transcript.append(reasoning="The user asks what I can show. " * 6)
    stage.transcript.append(MARKDOWN + "\n![a picture elsewhere](https://leak.example/x.png)")
    stage.transcript.end("142 tokens · 1.2 s · 118 tokens/s", tool_calls=[{"name": "look", "arguments": '{"a": [1]}'}])
    stage.transcript.begin("gpt-oss-20b", "And this?")
    stage.transcript.append("Well, I")
    stage.transcript.end("The engine ended while it answered.", "failed")
    stage.transcript.begin("gpt-oss-20b", "Again")
    stage.transcript.append(reasoning="Once more I think about it.\nAnd again.")
    stage.settle()


@pytest.mark.parametrize(("name", "theme"), [("light", LIGHT), ("dark", DARK)])
@pytest.mark.parametrize("width", [900, 300])
def test_it_fits_where_it_is_shown(page: Page, name: str, theme: str, width: int) -> None:
    stage = Stage(page, theme=theme)
    fill(stage)
    page.set_viewport_size({"width": width, "height": 1800})
    page.add_style_tag(content=".llmkit-transcript { height: 1600px !important; }")
    stage.settle()
    assert page.evaluate(SIDEWAYS) == []
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"transcript-{name}-{width}.png")  # for a person to look at
