"""Decisions, as pure functions: when a model expires, what makes room, when to start again, how long a load takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from llmkit.schemas import Download

CRASHES: Final = 3
CRASH_SECONDS: Final = 300.0
"""So many failures within so long end the restarts."""
FIRST_RESTART_SECONDS: Final = 1.0
LONGEST_RESTART_SECONDS: Final = 60.0
FIRST_USE_SECONDS: Final = 300.0
"""So long a model with a TTL of 0 waits for its first request."""
LEASE_SECONDS: Final = 10.0
"""So long after its last request a batch of one of many people keeps a model from being evicted."""
LONGEST_TTL_SECONDS: Final = 1e9
"""What is longer is for ever."""
_MOST_BEFORE_THE_END: Final = 0.99


# -- when a model expires ----------------------------------------------------------------------------------


def effective_ttl(
    asked: float | None, configured: float | None, default: float, ceiling: float | None = None
) -> float | None:
    """Give the seconds that a model may be idle, or None for ever.

    Parameters
    ----------
    asked, configured, default
        By the last request, by the configuration, by the server: the first that is given counts; negative is never.
    ceiling
        What the operator allows at most; None is no limit.
    """
    wanted = next((ttl for ttl in (asked, configured) if ttl is not None), default)
    never = not 0 <= wanted <= LONGEST_TTL_SECONDS
    if ceiling is not None and 0 <= ceiling <= LONGEST_TTL_SECONDS:
        return ceiling if never else min(wanted, ceiling)
    return None if never else wanted


def expires_at(
    ttl: float | None,
    loaded_at: datetime,
    last_used_at: datetime | None,
    *,
    busy: bool,
    ceiling: float | None = None,
) -> datetime | None:
    """Give the moment at which an idle model is unloaded, or None.

    The time starts at the end of the last request. With a TTL of 0 a model that nobody has asked yet waits a while
    for its first request, within the ceiling: who loads a model means to use it.
    """
    if ttl is None or busy:
        return None
    used = last_used_at if last_used_at is not None and last_used_at >= loaded_at else None
    if used is None and ttl == 0:
        ttl = min(FIRST_USE_SECONDS, ceiling) if ceiling is not None and ceiling > 0 else FIRST_USE_SECONDS
    return (used or loaded_at) + timedelta(seconds=ttl)


# -- when to start again -----------------------------------------------------------------------------------


def restart_delay(failures: Sequence[float], now: float) -> float | None:
    """Give the seconds until the next start of an engine that failed, or None to leave it.

    Parameters
    ----------
    failures
        When it failed, the last one included, in seconds of a monotonic clock.
    now
        The time by the same clock.
    """
    recent = [moment for moment in failures if now - moment <= CRASH_SECONDS]
    if len(recent) >= CRASHES:
        return None
    return min(FIRST_RESTART_SECONDS * 4.0 ** max(0, len(recent) - 1), LONGEST_RESTART_SECONDS)


# -- what makes room ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A loaded model that could be unloaded to make room.

    Attributes
    ----------
    held
        Bytes on each device; empty where that is not known.
    """

    model_id: str
    held: Mapping[int, int]
    idle_since: datetime
    busy: bool


@dataclass(frozen=True)
class Room:
    """What to unload, and whether there is room then; None where that is not known."""

    evict: list[str]
    fits: bool | None


def make_room(
    needed: int | None,
    free: Mapping[int, int] | None,
    candidates: Sequence[Candidate],
    *,
    count: int = 1,
    surplus: int = 0,
    force: bool = False,
) -> Room:
    """Decide what to unload for another model: as little as is enough, idle ones, the least recently used first.

    Parameters
    ----------
    needed
        Bytes that the model needs on each of ``count`` devices; None where that is not known, and then memory does
        not count.
    free
        Bytes that are free on each device; None where that is not known.
    candidates
        Every loaded model that holds memory.
    surplus
        How many have to go in any case, because no more may be loaded.
    force
        Busy models may go too, and what does not fit is tried all the same.
    """
    usable = sorted((c for c in candidates if force or not c.busy), key=lambda c: (c.busy, c.idle_since))
    if len(usable) < surplus:
        return Room([], fits=False)
    chosen = usable[:surplus]
    if needed is None or free is None:
        return Room([c.model_id for c in chosen], fits=None)

    def enough(victims: Sequence[Candidate]) -> bool:
        rooms = (left + sum(c.held.get(device, 0) for c in victims) for device, left in free.items())
        return sum(room >= needed for room in rooms) >= count

    for candidate in usable[surplus:]:
        if enough(chosen):
            break
        if any(device in free for device in candidate.held):
            chosen.append(candidate)
    if not enough(chosen) and not force:
        return Room([], fits=False)  # nobody is unloaded in vain
    # Some that were taken early can be spared when a larger one, or one on another device, had to follow.
    for candidate in list(chosen):
        rest = [c for c in chosen if c is not candidate]
        if len(rest) >= surplus and enough(rest):
            chosen = rest
    return Room([c.model_id for c in chosen], fits=True)


# -- how long a load takes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadRecord:
    """How an earlier load went: seconds in all, and until each step, without the time of downloads."""

    seconds: float
    steps: dict[str, float] = field(default_factory=dict)
    pss_bytes: int | None = None
    gpu_bytes: int | None = None
    launch: str | None = None
    """As in `LoadProgress`."""


def forecast(
    earlier: LoadRecord | None, step: str | None, step_seconds: float, elapsed: float, download: Download | None = None
) -> float | None:
    """Give the seconds that a load will still take, or None if that is not known.

    Parameters
    ----------
    earlier
        The last load of the same configuration.
    step, step_seconds
        The last step that was reached, and when, in seconds after the start.
    elapsed
        Seconds since the start.
    download
        How far the download is, while there is one.
    """
    if earlier is None:
        return None
    if download is not None:
        if download.eta_seconds is None:
            return None
        reached = earlier.steps.get(step, 0.0) if step else 0.0
        return download.eta_seconds + max(earlier.seconds - reached, 0.0)
    reached = earlier.steps.get(step, 0.0) if step else 0.0
    following = min((s for s in earlier.steps.values() if s > reached), default=earlier.seconds)
    # A step that takes longer than last time holds the clock until the next is reached.
    position = min(reached + elapsed - step_seconds, following)
    pace = min(max(step_seconds / reached, 0.5), 3.0) if reached > 1.0 else 1.0
    return max(earlier.seconds - position, 0.0) * pace


def fraction_done(elapsed: float, eta: float) -> float:
    """Give the part of a load that is over, by time."""
    whole = elapsed + eta
    return min(elapsed / whole, _MOST_BEFORE_THE_END) if whole > 0 else 0.0
