"""Pieces of HTML, everything in them escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from llmkit.client.loading import PHASES
from llmkit.client.results import describe_bytes, describe_download, describe_engine, describe_memory
from llmkit.errors import LLMKitError
from llmkit.schemas import Memory, Model, ModelError

STATUS_WORDS = {
    "unloaded": "Not loaded",
    "loading": "Loading",
    "loaded": "Loaded",
    "unloading": "Unloading",
    "failed": "Failed",
}


def seconds_in_words(seconds: float) -> str:
    """Give a duration for a person.

    Examples
    --------
    >>> seconds_in_words(0.0042), seconds_in_words(0.234), seconds_in_words(7.25), seconds_in_words(83)
    ('4 ms', '0.23 s', '7.2 s', '1 min 23 s')
    """
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def model_head(model: Model) -> str:
    """Give name and status of a model."""
    # Apart from the facts: only the status is announced, and not again because a number has changed.
    return (
        f'<div class="llmkit-name"><span>{escape(model.model_id)}</span> '
        f'<span class="llmkit-status llmkit-is-{model.status}" role="status">{STATUS_WORDS[model.status]}</span></div>'
    )


def model_facts(model: Model, now: datetime) -> str:
    """Give what is known of a model: a line that stays as it is, and for a loaded one a line that lives."""
    facts = [describe_engine(model.model_type, model.capabilities.engine_version), model.model_name]
    if model.status == "loaded":
        if model.capabilities.max_model_len:
            facts.append(f"{model.capabilities.max_model_len:,} tokens of context")
        if model.load_seconds is not None:
            facts.append(f"loaded in {seconds_in_words(model.load_seconds)}")
    elif model.status == "failed" and model.error is not None:
        # The error card says the rest.
        facts.append((model.reason or "").removeprefix(model.error.message.removesuffix(".")).strip(". "))
    else:
        facts.append(model.reason or "")
    if model.owner:
        facts.append(f"in use by {model.owner}")
    if model.configured_by:
        facts.append(f"configured by {model.configured_by}")
    if model.loaded_by:
        facts.append(f"loaded by {model.loaded_by}")
    lines = [f'<div class="llmkit-facts">{" · ".join(map(escape, filter(None, facts)))}</div>']
    if model.status == "loaded":
        live = filter(None, (describe_memory(model.memory), requests(model), expiry(model, now)))
        lines.append(f'<div class="llmkit-facts llmkit-live">{" · ".join(map(escape, live))}</div>')
    return "".join(lines)


def requests(model: Model) -> str:
    """Say how many requests a model has."""
    waiting = f", {model.queued} waiting" if model.queued else ""
    return f"{model.in_flight} running{waiting}" if model.in_flight or model.queued else "no requests"


def expiry(model: Model, now: datetime) -> str:
    """Say when a model is unloaded if nobody asks it; nothing if that is not so, or if it is busy."""
    if model.expires_at is None or model.in_flight or model.queued:
        return ""
    seconds = (model.expires_at - now).total_seconds()
    if seconds < 1:
        return "unloads now if idle"
    if seconds < 60:
        return f"unloads in {seconds:.0f} s if idle"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    words = f"{minutes} min" if minutes < 120 else f"{hours} h {rest} min" if rest else f"{hours} h"
    return f"unloads in {words} if idle"


def fix_words(arguments: Mapping[str, Any]) -> str:
    """Say what a button does that sets arguments and loads again.

    Examples
    --------
    >>> fix_words({"max_model_len": 1024})
    'Set max_model_len to 1024 and load again'
    """
    changes = " and ".join(f"{name} to {value}" for name, value in arguments.items())
    return f"Set {changes} and load again"


def load_label(model: Model, elapsed: float | None) -> str:
    """Give phase, share and time of a load."""
    parts = [PHASES.get(model.phase or "", "Loading")]
    if model.progress is not None:
        parts.append(f"{model.progress:.0%}")
    if model.download is not None:
        parts.append(describe_download(model.download))
    if elapsed is not None:
        parts.append(f"{elapsed:.0f} s" if elapsed < 60 else seconds_in_words(elapsed))
    if model.eta_seconds is not None:
        parts.append(f"about {seconds_in_words(max(model.eta_seconds, 1))} left")
    return f'<span class="llmkit-phase">{" · ".join(map(escape, parts))}</span>'


def error_card(error: ModelError | LLMKitError) -> str:
    """Give message, hint and, folded, the end of the engine's log."""
    log_tail = error.log_tail if isinstance(error, ModelError) else error.details.get("log_tail") or []
    hint = f'<div class="llmkit-hint">{_lines(error.hint)}</div>' if error.hint else ""
    log = ""
    if log_tail:
        text = escape("\n".join(map(str, log_tail)))
        log = f'<details><summary>End of the engine\'s log</summary><pre tabindex="0">{text}</pre></details>'
    return f'<div class="llmkit-card llmkit-card-error" role="alert"><b>{_lines(error.message)}</b>{hint}{log}</div>'


def note(text: str) -> str:
    """Give a line that says what was done."""
    return f'<div class="llmkit-note" role="status">{escape(text)}</div>'


def hint(text: str) -> str:
    """Give a quiet line that explains."""
    return f'<div class="llmkit-hint">{escape(text)}</div>'


def field_error(text: str) -> str:
    """Give what is wrong with a field."""
    return f'<div class="llmkit-field-error" role="alert">{escape(text)}</div>'


def freed(memory: Memory) -> str:
    """Say what an unload gave back."""
    sizes = [
        f"{describe_bytes(n)} of {kind}"
        for n, kind in ((memory.gpu_bytes, "GPU memory"), (memory.pss_bytes, "RAM"))
        if n
    ]
    if not sizes:
        return f"Unloaded; {memory.reason}." if memory.reason else "Unloaded."
    return f"Unloaded; freed {' and '.join(sizes)}" + ("." if memory.verified else ", not verified.")


def header(state: str, url: str, registry: str = "") -> str:
    """Give the line above the tabs: how the server is, where, and, where there are two registries, which it is."""
    words = {
        "connecting": "Connecting …",
        "connected": "Connected",
        "reconnecting": "The server does not answer; trying again …",
        "lost": "No server",
    }
    sign = f'<span class="llmkit-registry">{escape(registry)}</span>' if registry else ""
    return (
        f'<div class="llmkit-header"><span class="llmkit-brand">llmkit</span>'
        f'<span class="llmkit-connection llmkit-is-{state}" role="status">{words[state]}</span>'
        f"{sign}"
        f'<span class="llmkit-url">{escape(url)}</span></div>'
    )


def no_server(error: LLMKitError) -> str:
    """Give the card that stands in for everything when there is no server."""
    tried = error.details.get("tried") or []
    message = error.message.split("\n")[0].removesuffix(" Tried:")
    listed = "".join(f"<li>{escape(str(line))}</li>" for line in tried)
    where = f"<details><summary>What was tried</summary><ul>{listed}</ul></details>" if tried else ""
    start = "<pre>jupyter lab</pre>" if tried else ""
    return (
        f'<div class="llmkit-card llmkit-card-error" role="alert"><b>{escape(message)}</b>'
        f'<div class="llmkit-hint">{_lines(error.hint or "")}</div>{start}{where}</div>'
    )


def _lines(text: str) -> str:
    """Keep lines, and show what stands between backticks as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text)).replace("\n", "<br>")
