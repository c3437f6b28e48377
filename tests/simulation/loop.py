"""An event loop on which waiting costs nothing: when everybody sleeps, time jumps to whoever wakes first."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any


class Stuck(RuntimeError):
    """Everybody waits, and nobody will ever come."""


class _Selector(selectors.BaseSelector):
    """Asks the real selector without waiting, and moves the loop's time instead."""

    def __init__(self) -> None:
        self._inner = selectors.SelectSelector()
        self.now = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("Every task waits for another one.")
        if timeout <= 0:
            return []
        self.now += timeout
        return self._inner.select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio, whole, with its timeouts, on virtual seconds. One thread only."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual.now


class LoopClock:
    """The clock of whoever runs on a VirtualLoop; its wall time may be wrong by some seconds, its sleep is not."""

    def __init__(self, start: datetime) -> None:
        self._start = start
        self.wrong_s = 0.0

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.monotonic() + self.wrong_s)

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0))
