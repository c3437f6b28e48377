"""From a seed that breaks to the smallest plan that still breaks in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from tests.simulation.plan import Plan
from tests.simulation.world import Outcome

TRIES_MAX = 400
Play = Callable[[Plan], Outcome]


class Shrinker:
    """Tries smaller plans as long as one of them breaks like the first.

    play: plays a plan. tries_max: plans to play at most.
    """

    def __init__(self, play: Play, tries_max: int = TRIES_MAX) -> None:
        self._play, self._left = play, tries_max

    def shrink(self, plan: Plan) -> tuple[Plan, Outcome]:
        """The smallest plan found, and what it left behind."""
        self.plan, self.outcome = plan, self._play(plan)
        self._kind = self.outcome.kind
        if not self._kind:
            return plan, self.outcome
        while self._left > 0 and any([self._bars(), self._fewer(), self._kinds(), self._moments()]):
            pass
        return self.plan, self.outcome

    def _try(self, **changes: Any) -> bool:
        """Take a smaller plan where it breaks in the same way."""
        smaller = replace(self.plan, **changes)
        if smaller == self.plan or self._left <= 0:
            return False
        self._left -= 1
        outcome = self._play(smaller)
        if outcome.kind != self._kind:
            return False
        self.plan, self.outcome = smaller, outcome
        return True

    def _bars(self) -> bool:
        low, high, better = 0, self.plan.bars, False  # low: not enough
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(bars=middle):
                high, better = middle, True
            else:
                low = middle
        return better

    def _fewer(self) -> bool:
        better = len(self.plan.symbols) > 1 and any(self._try(symbols=(symbol,)) for symbol in self.plan.symbols)
        for name in ("deaths", "full", "jumps"):
            for each in getattr(self.plan, name):
                better |= self._try(**{name: tuple(other for other in getattr(self.plan, name) if other != each)})
        for name in ("to_the_end", "very_late", "stormy_restart"):
            better |= getattr(self.plan, name) and self._try(**{name: False})
        return better

    def _kinds(self) -> bool:
        better = False
        for name, how in asdict(self.plan.faults).items():
            if how and not name.endswith("_s"):
                better |= self._try(faults=replace(self.plan.faults, **{name: 0.0}))
        return better

    def _moments(self) -> bool:
        """Draws of fate that did harm, half of them at a time, then a quarter, and so on (Zeller's ddmin)."""
        struck, better = list(self.outcome.struck), False
        if self.plan.only is None and not self._try(only=frozenset(struck)):
            return False
        size = max(len(struck) // 2, 1)
        while struck and self._left > 0:
            for part in _parts(struck, size):
                rest = [draw for draw in struck if draw not in part]
                if self._try(only=frozenset(rest)):
                    struck, better = rest, True
            if size == 1:
                break
            size //= 2
        return better


def _parts(draws: list[int], size: int) -> Iterator[set[int]]:
    return (set(draws[first : first + size]) for first in range(0, len(draws), size))
