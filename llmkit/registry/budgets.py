"""How much each of the people who share a server may ask: reserved before a request is sent, settled when it is over.

What is reserved counts from that moment, so that requests at once cannot spend the same rest twice. It is in the
database before the request goes out: one that a killed server has not settled stays charged as it was reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from llmkit.errors import BudgetExhausted, LLMKitError, NotReady
from llmkit.registry.database import Database, Schema
from llmkit.schemas import UsageOfDay

MINUTE: Final = 60.0
DAY: Final = 86_400.0
KEPT_DAYS: Final = 400
"""So long the usage of a day can be read: a school year."""
LIMITS: Final = ("requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day")
_ERRORS = (LLMKitError, OSError, sqlite3.Error)
T = TypeVar("T")


class _UsageFile(Database):
    schema = Schema(
        "usage.sqlite",
        0x6C6C6D75,  # "llmu"
        [
            [
                """
                CREATE TABLE charges (
                    id INTEGER PRIMARY KEY,
                    user TEXT NOT NULL,
                    model_id TEXT NOT NULL,
                    started_at REAL NOT NULL,
                    tokens INTEGER NOT NULL CHECK (tokens >= 0),
                    settled INTEGER NOT NULL CHECK (settled IN (0, 1))
                ) STRICT
                """,
                "CREATE INDEX charges_by_time ON charges (started_at)",
            ]
        ],
        "usage",
    )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        super()._prepare(connection)
        # A killed process loses nothing so; only a machine that loses its power may lose the last moments.
        connection.execute("PRAGMA synchronous = NORMAL")


@dataclass(eq=False, slots=True)
class Charge:
    """What one request takes of its user's budget."""

    number: int
    user: str
    model_id: str
    started_at: float
    """Seconds of the epoch."""
    tokens: int
    settled: bool = False


@dataclass(eq=False, slots=True)
class _Window:
    """The charges of the last so many seconds, oldest first, and their tokens."""

    seconds: float
    charges: deque[Charge] = field(default_factory=deque)
    tokens: int = 0

    def add(self, charge: Charge) -> None:
        self.charges.append(charge)
        self.tokens += charge.tokens

    def forget(self, now: float) -> None:
        while self.charges and self.charges[0].started_at <= now - self.seconds:
            self.tokens -= self.charges.popleft().tokens

    def has(self, charge: Charge) -> bool:
        return bool(self.charges) and charge.number >= self.charges[0].number

    def wait(self, now: float, *, requests: int = 0, tokens: int = 0) -> float:
        """Give the seconds after which so many requests and tokens have left."""
        for charge in self.charges:
            requests, tokens = requests - 1, tokens - charge.tokens
            if requests <= 0 and tokens <= 0:
                # The clock may have been set back since.
                return min(max(1.0, charge.started_at + self.seconds - now), self.seconds)
        return self.seconds


class Budgets:
    """The budgets of everybody, of one server; SQLite lives on one thread.

    Parameters
    ----------
    state_dir
        The state folder.
    limits
        By the names in `LIMITS`, the same for everybody; what is not named is not limited.
    logger
        For what the operator should read.
    clock
        Gives seconds of the epoch.
    """

    def __init__(
        self,
        state_dir: Path,
        limits: dict[str, int],
        logger: logging.Logger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self._state_dir = state_dir
        self._log = logger
        self._clock = clock
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="llmkit-usage")
        self._file: _UsageFile | None = None
        self._windows: dict[str, tuple[_Window, _Window]] = {}
        self._last = 0
        self._failure: str | None = None
        self._closed = False

    async def _on_disk(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))

    async def open(self) -> None:
        """Read what was charged of late.

        Raises
        ------
        LLMKitError, OSError
            If the file cannot be used; then nobody's budget is known.
        """
        rows, self._last = await self._on_disk(self._open, self._clock())
        for row in rows:
            charge = Charge(*row)
            for window in self._of(charge.user):
                window.add(charge)

    def _open(self, now: float) -> tuple[list[Any], int]:
        self._file = _UsageFile(self._state_dir)
        with self._file.write() as connection:
            connection.execute("DELETE FROM charges WHERE started_at < ?", (now - KEPT_DAYS * DAY,))
            (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM charges").fetchone()
            query = (
                "SELECT id, user, model_id, started_at, tokens, settled FROM charges WHERE started_at > ? ORDER BY id"
            )
            return connection.execute(query, (now - DAY,)).fetchall(), int(last)

    async def close(self) -> None:
        """Write what is settled, and close the file; twice is no error."""
        if self._closed:
            return
        self._closed = True
        await self._on_disk(self._close)
        self._disk.shutdown(wait=False)

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(sqlite3.Error):
                self._file.close()

    def problems(self) -> list[str]:
        """Say what is wrong with the record of usage."""
        problems = list(self._file.problems) if self._file else []
        return [*problems, f"usage is not recorded: {self._failure}"] if self._failure else problems

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens are limited."""
        return any(name.startswith("tokens_") for name in self.limits)

    # -- charging ------------------------------------------------------------------------------------------

    def _of(self, user: str) -> tuple[_Window, _Window]:
        if user not in self._windows:
            self._windows[user] = (_Window(MINUTE), _Window(DAY))
        return self._windows[user]

    async def reserve(self, user: str, model_id: str, tokens: int, *, limited: bool = True) -> Charge:
        """Charge a request with what it takes at most; `settle` or `take_back` follows.

        Parameters
        ----------
        limited
            Whether the limits hold for this user; the usage is kept in any case.

        Raises
        ------
        BudgetExhausted
            With the seconds until there is enough.
        NotReady, DiskFull
            If it cannot be written down.
        """
        now = self._clock()
        windows = self._of(user)
        for window in windows:
            window.forget(now)
        if limited:
            self._check(windows, tokens, now)
        # No other request comes in between the look and this.
        self._last += 1
        charge = Charge(self._last, user, model_id, now, tokens)
        for window in windows:
            window.add(charge)
        try:
            await self._on_disk(self._insert, charge.number, user, model_id, now, tokens)
        except BaseException as error:
            self._forget(charge)
            # Who has left does not stop the thread, which may have written it all the same.
            self._write_later("DELETE FROM charges WHERE id = ?", charge.number)
            if isinstance(error, sqlite3.Error | OSError):
                raise NotReady("The usage cannot be written down, so nothing is asked.", hint="Try again.") from error
            raise
        return charge

    def _check(self, windows: tuple[_Window, _Window], tokens: int, now: float) -> None:
        for window, span in zip(windows, ("minute", "day"), strict=True):
            for what, used, more in (("requests", len(window.charges), 1), ("tokens", window.tokens, tokens)):
                limit = self.limits.get(f"{what}_per_{span}")
                if limit is None or used + more <= limit:
                    continue
                if more > limit:
                    raise BudgetExhausted(
                        f"This could take {more} {what}; you have {limit} a {span}.",
                        param="max_tokens",
                        hint="Ask for less: a shorter prompt, or a smaller max_tokens.",
                        details={"limit": limit, "used": used, "per": span, "retry_after": window.seconds},
                    )
                wait = window.wait(now, **{what: used + more - limit})
                raise BudgetExhausted(
                    f"Of your {limit} {what} a {span} {max(0, limit - used)} are left, and this could take {more}.",
                    hint=f"Ask again in {_in_words(wait)}"
                    + (", or for less: a smaller max_tokens." if what == "tokens" else "."),
                    details={"limit": limit, "used": used, "per": span, "retry_after": wait},
                )

    def settle(self, charge: Charge, tokens: int | None) -> None:
        """Charge what the request took in truth; None, where nobody has counted, leaves what was reserved."""
        if charge.settled:
            return
        charge.settled = True
        if tokens is not None:
            for window in self._of(charge.user):
                if window.has(charge):
                    window.tokens += tokens - charge.tokens
            charge.tokens = tokens
        self._write_later("UPDATE charges SET tokens = ?, settled = 1 WHERE id = ?", charge.tokens, charge.number)

    def take_back(self, charge: Charge) -> None:
        """Charge nothing: the request was never sent."""
        if not charge.settled:
            charge.settled = True
            self._forget(charge)
            self._write_later("DELETE FROM charges WHERE id = ?", charge.number)

    def _forget(self, charge: Charge) -> None:
        for window in self._of(charge.user):
            if window.has(charge):
                with contextlib.suppress(ValueError):
                    window.charges.remove(charge)
                    window.tokens -= charge.tokens

    def _write_later(self, statement: str, *values: Any) -> None:
        # The thread takes one after the other: it is written after the reservation, and before the file is closed.
        self._disk.submit(self._execute, statement, values)

    def _execute(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            with self._opened().write() as connection:
                connection.execute(statement, values)
        except _ERRORS as error:
            self._failure = " ".join(str(error).splitlines())
            self._log.warning("The record of usage: %s", self._failure)
        else:
            self._failure = None

    def _insert(self, *row: Any) -> None:
        with self._opened().write() as connection:
            connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, 0)", row)

    def _opened(self) -> _UsageFile:
        if self._file is None:
            raise NotReady("The record of usage is not open.")
        return self._file

    # -- looking -------------------------------------------------------------------------------------------

    async def by_day(self, user: str | None = None) -> list[UsageOfDay]:
        """Give requests and tokens of each day (UTC), user and model, oldest first.

        Parameters
        ----------
        user
            Gives only theirs.
        """
        return await self._on_disk(self._by_day, user)

    def _by_day(self, user: str | None) -> list[UsageOfDay]:
        with self._opened().read() as connection:
            rows = connection.execute(
                "SELECT date(started_at, 'unixepoch') AS day, user, model_id, count(*), sum(tokens) FROM charges "
                "WHERE ? IS NULL OR user = ? GROUP BY day, user, model_id ORDER BY day, user, model_id",
                (user, user),
            ).fetchall()
        names = ("day", "user", "model_id", "requests", "tokens")
        return [UsageOfDay(**dict(zip(names, row, strict=True))) for row in rows]

    def left(self, user: str) -> dict[str, int]:
        """Give what is left of each limit now."""
        now = self._clock()
        left: dict[str, int] = {}
        for window, span in zip(self._of(user), ("minute", "day"), strict=True):
            window.forget(now)
            for what, used in (("requests", len(window.charges)), ("tokens", window.tokens)):
                if (limit := self.limits.get(f"{what}_per_{span}")) is not None:
                    left[f"{what}_per_{span}"] = max(0, limit - used)
        return left


def _in_words(seconds: float) -> str:
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
