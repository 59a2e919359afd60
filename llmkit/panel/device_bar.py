"""Who holds the memory of the machine, as bars with their words beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import chain

from llmkit.client.results import describe_bytes
from llmkit.schemas import Devices, GPUDevice, RAMDevice, Share

LOOKS = 6
"""So many models look different; the style sheet has a colour and a pattern for each."""
WAITING = (
    '<div class="llmkit-devices"><section class="llmkit-device">'
    '<div class="llmkit-device-head"><b>RAM</b><span></span></div>'
    '<div class="llmkit-meter"></div><ul class="llmkit-legend"><li>&nbsp;</li></ul></section></div>'
)
"""Takes the room until the machine is known."""


@dataclass(frozen=True)
class Part:
    """A piece of a bar."""

    words: str
    bytes: int | None
    """None: it is there, but nobody knows how large it is."""
    look: str


def device_bar(devices: Devices) -> str:
    """Give a bar for main memory and one for each GPU; every number is there as text, too."""
    names = dict.fromkeys(share.model_id for share in chain(devices.ram.shares, *(gpu.shares for gpu in devices.gpus)))
    looks = {name: f"model-{number % LOOKS}" for number, name in enumerate(names)}
    bars = "".join([_ram(devices.ram, looks), *(_gpu(gpu, looks) for gpu in devices.gpus)])
    return f'<div class="llmkit-devices">{bars}</div>'


def _ram(ram: RAMDevice, looks: dict[str, str]) -> str:
    parts = [*_models(ram.shares, looks)]
    if ram.standby_bytes is not None:
        parts.append(Part("ready for the next load", ram.standby_bytes, "standby"))
    notes = ["limited by the container"] if ram.limited_by == "cgroup" else []
    return _device("RAM", "", parts, ram.used_bytes, ram.total_bytes, notes)


def _gpu(gpu: GPUDevice, looks: dict[str, str]) -> str:
    parts = _models(gpu.shares, looks)
    notes = [] if gpu.utilization is None else [f"{gpu.utilization:.0%} busy"]
    reserved = [Part("set aside for a load", gpu.reserved_bytes, "reserved")] if gpu.reserved_bytes else []
    return _device(f"GPU {gpu.index}", gpu.name, parts, gpu.used_bytes, gpu.total_bytes, notes, reserved)


def _models(shares: Iterable[Share], looks: dict[str, str]) -> list[Part]:
    return [Part(share.model_id, share.bytes, looks[share.model_id]) for share in shares]


def _device(
    title: str, name: str, held: list[Part], used: int, total: int, notes: list[str], beyond: Iterable[Part] = ()
) -> str:
    """Draw one bar: the known parts of what is used, the rest of it, and what is `beyond` that."""
    known = sum(part.bytes or 0 for part in held)
    # The parts are measured one after the other, so their sum can be more than what is used.
    parts = [*held, *([Part("other use", used - known, "other")] if used > known else []), *beyond]
    whole = max(total, sum(part.bytes or 0 for part in parts), 1)
    pieces = "".join(
        f'<i class="llmkit-part llmkit-look-{part.look}" style="width:{part.bytes / whole:.2%}"></i>'
        for part in parts
        if part.bytes
    )
    legend = "".join(_legend(part) for part in parts)
    amount = f"{describe_bytes(used)} of {describe_bytes(total)} used"
    said = [amount, *notes]
    label = f"{title}: {', '.join(said)}"
    return (
        f'<section class="llmkit-device"><div class="llmkit-device-head"><b>{escape(title)}</b>'
        f"<span>{escape(name)}</span><span>{escape(' · '.join(said))}</span></div>"
        f'<div class="llmkit-meter" role="img" aria-label="{escape(label)}">{pieces}</div>'
        f'<ul class="llmkit-legend">{legend}</ul></section>'
    )


def _legend(part: Part) -> str:
    size = "size not known" if part.bytes is None else describe_bytes(part.bytes)
    return (
        f'<li><i class="llmkit-swatch llmkit-look-{part.look}"></i>'
        f"<span>{escape(part.words)}</span> <span>{escape(size)}</span></li>"
    )
