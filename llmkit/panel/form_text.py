"""What the form says, as pieces of HTML, everything in them escaped."""

from __future__ import annotations

from html import escape

from llmkit.client.results import describe_bytes
from llmkit.schemas import LoadPlan, MemoryEstimate


def field_problem(text: str) -> str:
    """Give what is wrong with a field; a screen reader says it when the person stops typing, not in between."""
    told = text[:1].upper() + text[1:]
    return f'<div class="llmkit-field-error" role="status">{escape(told)}</div>'


def memory_line(plan: LoadPlan) -> str:
    """Say what a load would take and whether there is room, or nothing if it takes none of this machine."""
    estimate = plan.estimate
    if estimate is None:
        return ""
    kind = "GPU memory" if estimate.device == "gpu" else "RAM"
    if estimate.device_count > 1:
        kind += f" on {estimate.device_count} GPUs together"
    if estimate.total_bytes is None:
        why = f": {estimate.reason}" if estimate.reason else ""
        words = f"How much {kind} it will take is not known{why.rstrip('.')}."
        return _card("unknown", words)
    words = f"{_takes(estimate, kind)}{_parts(estimate)}"
    if plan.free_bytes is not None:
        words += f"; {describe_bytes(plan.free_bytes)} free"
    words += "."
    if plan.fits is False:
        return _card("no", f"{words} It does not fit. {plan.reason or ''}".rstrip())
    if plan.evict:
        names = " and ".join([", ".join(plan.evict[:-1]), plan.evict[-1]] if len(plan.evict) > 1 else plan.evict)
        words += f" To make room, {names} would be unloaded first."
    return _card("unknown" if plan.fits is None else "yes", words)


def _takes(estimate: MemoryEstimate, kind: str) -> str:
    size = describe_bytes(estimate.total_bytes)
    if estimate.elastic:
        return f"Takes what it finds free, at least about {size} of {kind}"
    if estimate.measured:
        return f"Will take {size} of {kind}, as it did before"
    return f"Will take about {size} of {kind}"


def _parts(estimate: MemoryEstimate) -> str:
    known = (
        ("weights", estimate.weights_bytes),
        ("KV cache", estimate.kv_cache_bytes),
        ("rest", estimate.overhead_bytes),
    )
    told = ", ".join(f"{name} {describe_bytes(size)}" for name, size in known if size)
    return f" ({told})" if told else ""


def _card(fits: str, words: str) -> str:
    return f'<div class="llmkit-memory llmkit-fits-{fits}" role="status">{escape(words)}</div>'


def editing(model_id: str) -> str:
    """Say whose configuration is in the form."""
    return f'<div class="llmkit-note" role="status">Editing <b>{escape(model_id)}</b></div>'


def copy_of(model_id: str, *, loses_key: bool) -> str:
    """Say of what the form holds a copy."""
    key = " Its key is not copied: type it again." if loses_key else ""
    return f'<div class="llmkit-note" role="status">A copy of <b>{escape(model_id)}</b>, not saved yet.{key}</div>'
