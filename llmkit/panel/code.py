"""What the panel does, as code: the Python and the curl that do the same, ready to be pasted.

No key is ever in it: ``env:NAME`` and the mark of a key that the server keeps stay, a raw key is left out.
"""

from __future__ import annotations

import json
import keyword
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from llmkit.schemas import OPTIONAL_FIELDS, SERVERS_OWN

WIDTH = 88
INDENT = "    "
# Linux takes no argument of a program that is longer than 128 KiB; prompts with images are.
LONGEST_ARGUMENT = 100_000
LOG_LINES = 200

_IMPORT = "import llmkit\n\nclient = llmkit.connect()\n"
_FIRST_LINE = '# In a terminal of JupyterLab first: eval "$(llmkit env)"\n'
_KEY = "api_key"
_HOW_PYTHON = (
    "# The key is left out. To give it, import getpass and add to model_kwargs:\n"
    '#     "api_key": getpass.getpass("API key: "),\n'
)
_HOW_CURL = (
    '# The key is left out. Add "api_key": "env:NAME" to model_kwargs for a variable of the server, or give it in\n'
    "# Python, where client.configure takes getpass.getpass(): a shell would keep it in its history.\n"
)


@dataclass(frozen=True)
class Code:
    """One action, in Python with the client and in a shell with curl."""

    python: str
    curl: str


# -- actions -----------------------------------------------------------------------------------------------


def configure(body: Mapping[str, Any]) -> Code:
    """Store a new configuration; ``body`` is that of ``POST /llm/configure_model/``."""
    kept, left_out = _without_key(body, keep_mark=False)
    given = {name: value for name, value in kept.items() if value is not None}
    call = _call("client.configure", **given)
    return Code(
        python=_IMPORT + (_HOW_PYTHON if left_out else "") + f"configuration = {call}\nprint(configuration)\n",
        curl=_FIRST_LINE + (_HOW_CURL if left_out else "") + _curl("POST", "configure_model/", given),
    )


def update(config_id: str, model_id: str, body: Mapping[str, Any], *, reload: bool = False) -> Code:
    """Replace a configuration; ``body`` is that of ``PUT /llm/configuration/{config_id}``.

    The mark of a key stays in it, as the server then keeps the key that it has.
    """
    kept, left_out = _without_key(body, keep_mark=True)
    given = {"model_id": model_id} | {name: value for name, value in kept.items() if value is not None}
    # The client changes what it is given; what the body has not is to go.
    changes = given | {name: None for name in OPTIONAL_FIELDS if name not in given}
    changes |= {"reload": True} if reload else {}
    del changes["model_id"]
    query = "?reload=true" if reload else ""
    return Code(
        python=_IMPORT
        + (_HOW_PYTHON if left_out else "")
        + f"configuration = {_call('client.update', model_id, **changes)}\nprint(configuration)\n",
        curl=_FIRST_LINE
        + (_HOW_CURL if left_out else "")
        + _curl("PUT", f"configuration/{_quoted(config_id)}{query}", given),
    )


def load(model_id: str, config_id: str) -> Code:
    """Load a model."""
    return Code(
        python=_IMPORT + f"print({_call('client.load', model_id)})\n",
        curl=_FIRST_LINE
        + "# It answers when the model is loaded; with ?wait=false at once.\n"
        + _curl("POST", f"load_model/{_quoted(config_id)}"),
    )


def unload(model_id: str) -> Code:
    """Unload a model."""
    return Code(
        python=_IMPORT + f"print({_call('client.unload', model_id)})\n",
        curl=_FIRST_LINE + _curl("POST", f"unload_model/{_quoted(model_id)}"),
    )


def delete(config_id: str, model_id: str, *, unload: bool = False) -> Code:
    """Delete a configuration, a loaded model's only with ``unload``."""
    return Code(
        python=_IMPORT + _call("client.delete", model_id, **({"unload": True} if unload else {})) + "\n",
        curl=_FIRST_LINE + _curl("DELETE", f"configuration/{_quoted(config_id)}" + ("?unload=true" if unload else "")),
    )


def logs(model_id: str) -> Code:
    """Give the end of an engine's log."""
    return Code(
        python=_IMPORT + f'print("\\n".join({_call("client.logs", model_id, tail=LOG_LINES)}))\n',
        curl=_FIRST_LINE + _curl("GET", f"models/{_quoted(model_id)}/logs?tail={LOG_LINES}"),
    )


def prompt(body: Mapping[str, Any]) -> Code:
    """Ask a model and show the answer as it comes; ``body`` is that of ``POST /llm/inference/``."""
    model_id, text, options = _parts(body)
    stream = _call("client.stream", model_id, text, **options)
    return Code(
        python=_IMPORT
        + f"with {stream} as stream:\n"
        + '    for piece in stream:\n        print(piece, end="", flush=True)\n'
        + "print()\nprint(stream.answer.usage, stream.answer.timings)\n",
        curl=_FIRST_LINE + _curl("POST", "inference/", _asking(model_id, text, {**options, "stream": True})),
    )


def compare(bodies: Sequence[Mapping[str, Any]]) -> Code:
    """Ask several models, or one with several parameters; each body is that of `prompt`.

    Python asks them at once, curl one after the other: answers that come at once would run into each other.
    """
    asked = [_parts(body) for body in bodies]
    requests = [{"model_id": model_id, "prompt": text, **options} for model_id, text, options in asked]
    commands = [_curl("POST", "inference/", _asking(*one)) for one in asked]
    return Code(
        python="from concurrent.futures import ThreadPoolExecutor\n\n"
        + _IMPORT
        + f"requests = {_literal(requests, '', len('requests = '))}\n\n\n"
        + "def ask(request):\n"
        + "    try:\n        return client.prompt(**request)\n"
        + "    except llmkit.LLMKitError as error:\n        return error\n\n\n"
        + "with ThreadPoolExecutor(len(requests) or 1) as pool:\n"
        + "    answers = list(pool.map(ask, requests))\n"
        + "for request, answer in zip(requests, answers):\n"
        + '    print(request["model_id"], answer, getattr(answer, "timings", ""), sep="\\n", end="\\n\\n")\n',
        curl=_FIRST_LINE + "".join(commands),
    )


# -- parts -------------------------------------------------------------------------------------------------


def _parts(body: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    # The same request_id twice would be refused while the first runs; how it is sent, the code says itself.
    options = {k: v for k, v in (body.get("inference_kwargs") or {}).items() if k not in ("stream", "request_id")}
    return str(body.get("model_id") or ""), str(body.get("prompt") or ""), options


def _asking(model_id: str, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_id": model_id, "prompt": text, **({"inference_kwargs": dict(options)} if options else {})}


def _without_key(body: Mapping[str, Any], *, keep_mark: bool) -> tuple[dict[str, Any], bool]:
    """Give a body without keys and without what is the server's own, and whether a key was in it."""
    found = False

    def copy(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Mapping):
            kept = {}
            for name, one in value.items():
                is_mark = isinstance(one, Mapping) and bool(one.get("secret"))
                is_raw = name == _KEY and one not in (None, "") and not is_mark and not str(one).startswith("env:")
                if is_raw or (is_mark and not keep_mark):
                    found = True
                elif name != _KEY or one not in (None, ""):
                    kept[name] = copy(one)
            return kept
        return [copy(one) for one in value] if isinstance(value, list | tuple) else value

    return copy({name: value for name, value in body.items() if name not in SERVERS_OWN}), found


def _quoted(name: str) -> str:
    return quote(name, safe="")


# -- Python ------------------------------------------------------------------------------------------------


def _call(function: str, *positional: Any, **named: Any) -> str:
    """Give a call, on one line if it fits."""
    plain = {name: value for name, value in named.items() if name.isidentifier() and not keyword.iskeyword(name)}
    other = {name: value for name, value in named.items() if name not in plain}
    arguments = [("", value) for value in positional]
    arguments += [(f"{name}=", value) for name, value in plain.items()]
    arguments += [("**", other)] if other else []
    flat = f"{function}({', '.join(before + _flat(value) for before, value in arguments)})"
    if len(flat) <= WIDTH - len("configuration = "):
        return flat
    lines = (f"{INDENT}{before}{_literal(value, INDENT, len(before))},\n" for before, value in arguments)
    return f"{function}(\n{''.join(lines)})"


def _literal(value: Any, indent: str, before: int) -> str:
    """Give a value as Python, over several lines where one is too short, after so many characters on its line."""
    flat = _flat(value)
    if len(indent) + before + len(flat) + 1 <= WIDTH:
        return flat
    deeper = indent + INDENT
    if isinstance(value, Mapping) and value:
        keys = [(f"{_text(str(name))}: ", one) for name, one in value.items()]
        return _between("{", [key + _literal(one, deeper, len(key)) for key, one in keys], "}", indent, ",")
    if isinstance(value, list | tuple) and value:
        return _between("[", [_literal(one, deeper, 0) for one in value], "]", indent, ",")
    if isinstance(value, str) and "\n" in value[:-1]:
        return _between("(", [_text(line) for line in re.findall(r"[^\n]*\n|[^\n]+", value)], ")", indent, "")
    return flat


def _between(left: str, lines: Sequence[str], right: str, indent: str, comma: str) -> str:
    return f"{left}\n" + "".join(f"{indent}{INDENT}{line}{comma}\n" for line in lines) + indent + right


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(name))}: {_flat(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flat, value)) + "]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    """Give a string in double quotes where that costs nothing."""
    told = repr(str(value))
    return f'"{told[1:-1]}"' if told[0] == "'" and '"' not in told else told


# -- curl --------------------------------------------------------------------------------------------------


def _curl(method: str, path: str, body: Mapping[str, Any] | None = None) -> str:
    """Give one command; the address may end in a slash or not."""
    streams = body is not None and bool((body.get("inference_kwargs") or {}).get("stream"))
    how = "-sSN" if streams else "-sS -w '\\n'"  # an answer does not end its line itself
    words = [f'curl {how} -X {method} "${{LLMKIT_SERVER_URL%/}}/llm/{path}"']
    words.append('-H "Authorization: token $LLMKIT_TOKEN"')
    if body is None:
        return " \\\n  ".join(words) + "\n"
    words.append('-H "Content-Type: application/json"')
    told = _json(body)
    if len(told.encode()) <= LONGEST_ARGUMENT:
        words.append(f"-d {shlex.quote(told)}\n")
    else:
        # No line of the JSON is the word that ends it: each begins with a bracket or a space.
        words.append(f"--data-binary @- <<'END'\n{told}\nEND\n")
    return " \\\n  ".join(words)


def _json(body: Mapping[str, Any]) -> str:
    """Give a body to read; what no terminal takes as a character is escaped."""
    told = json.dumps(body, indent=2, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e\n]", lambda found: _visible(found[0]), told)


def _visible(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]
