"""When something is made ready for the next load, and when it is given back."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, Literal

import psutil

from llmkit.engines.base import EngineType, PreparedType
from llmkit.process.devices import Devices
from llmkit.registry.model import Model

Mode = Literal["auto", "on", "off"]

LOOK_SECONDS: Final = 1.0
QUIET_LOOKS: Final = 3
"""So many looks in a row must have found the machine quiet."""
QUIET_SHARE: Final = 0.5
"""Of the processor time of the machine; what is busier does not get more to do."""
ROOM_BYTES: Final = 4 << 30
"""So much memory must be free to make something ready that was not asked for with `on`."""
LEAST_BYTES: Final = 1 << 30
"""With less than that left, it is given back."""
MOST_FAILURES: Final = 3
"""Then it is not tried again as long as the server runs."""


class Readiness:
    """Watches for a good moment, and for the end of it.

    Parameters
    ----------
    mode
        ``auto``: where a load is likely, memory is plenty and the server is not a JupyterHub user's, of which a machine
        has many. ``on``: wherever a load is likely and memory is not all but gone. ``off``: never.
    engine_types
        By name.
    models
        Gives every model.
    busy
        Gives the number of loads and requests under way.
    run_dir
        The server's folder.
    devices
        Measures what is free.
    """

    def __init__(
        self,
        mode: Mode,
        engine_types: Mapping[str, EngineType],
        models: Callable[[], Collection[Model]],
        busy: Callable[[], int],
        run_dir: Path,
        devices: Devices,
        logger: logging.Logger,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        if mode == "auto" and "JUPYTERHUB_USER" in environ and not environ.get("JUPYTERHUB_SERVICE_NAME"):
            mode = "off"
        self._mode = mode
        types = engine_types if mode != "off" else {}
        self._types = {name: one for name, one in types.items() if isinstance(one, PreparedType)}
        self._models = models
        self._busy = busy
        self._run_dir = run_dir
        self._devices = devices
        self._log = logger
        self._times = psutil.cpu_times()
        self._quiet_looks = 0
        self._failures = 0

    async def watch(self) -> None:
        """Look again and again; ends only if there is nothing that could be made ready."""
        if not self._types:
            return
        while self._failures < MOST_FAILURES:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except Exception:  # noqa: BLE001  # a load goes on without
                self._failures += 1
                self._log.exception("Nothing could be made ready for the next load.")
        self._log.info("Nothing is made ready for loads any more: it was tried in vain %d times.", MOST_FAILURES)
        await self.close()  # nobody watches it from now on

    async def close(self) -> None:
        """Give everything back. Bounded at 10 s."""
        done = await asyncio.gather(*(one.put_away() for one in self._types.values()), return_exceptions=True)
        for error in done:
            if isinstance(error, Exception):  # what else is to be closed must be closed all the same
                self._log.error("What was made ready for a load could not be given back.", exc_info=error)

    async def held_bytes(self, *, anonymous: bool = False) -> int | None:
        """Measure the main memory that is held for loads to come; None if there is nothing.

        With ``anonymous`` without mapped files, of which the kernel can have the memory at any time.
        """
        held = [await one.prepared_bytes(anonymous=anonymous) for one in self._types.values()]
        known = [size for size in held if size is not None]
        return sum(known) if known else None

    async def _look(self) -> None:
        free = await asyncio.to_thread(self._devices.free_ram)
        is_quiet = self._busy_share() < QUIET_SHARE and not self._busy()
        self._quiet_looks = self._quiet_looks + 1 if is_quiet else 0
        for name, engine_type in self._types.items():
            there = engine_type.is_prepared
            if not there and not self._is_good_moment(free):
                continue  # most of the time, and nothing more is looked at
            wanted = self._wanted(name)
            if wanted is not None and await asyncio.to_thread(engine_type.unavailable) is not None:
                wanted = None
            if there and (wanted is None or free < LEAST_BYTES):
                await engine_type.put_away()
            elif wanted is not None:
                made = await engine_type.prepare(wanted.configuration, self._new_folder(), self._log)
                if not made:  # it cannot be made, ended by itself, or does not fit any more
                    self._failures += 1

    def _busy_share(self) -> float:
        """Give the share of all processor time since the look before that was not idle."""
        before, self._times = self._times, psutil.cpu_times()
        spent = sum(self._times) - sum(before)
        return 1 - (self._times.idle - before.idle) / spent if spent else 1.0

    def _is_good_moment(self, free: int) -> bool:
        room = ROOM_BYTES if self._mode == "auto" else LEAST_BYTES * 2
        return self._quiet_looks >= QUIET_LOOKS and free >= room

    def _wanted(self, model_type: str) -> Model | None:
        """Give the model that is most likely to be loaded next: one that is not, and of these the latest."""
        found = [model for model in self._models() if model.configuration.model_type == model_type]
        return next((model for model in reversed(found) if not model.live), found[-1] if found else None)

    def _new_folder(self) -> Path:
        # Short: the path of a unix socket in it has at most 107 bytes.
        return self._run_dir / f"s{os.urandom(5).hex()}"
