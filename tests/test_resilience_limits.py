"""What the breaker, the rate limit and the cache hold, whatever comes in whatever sequence."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.clock.clock import VirtualClock
from trader_lib.errors.taxonomy import RateLimited
from trader_lib.resilience.breaker import CircuitBreaker, CircuitOpen
from trader_lib.resilience.cache import TtlCache
from trader_lib.resilience.rate_limit import RateLimiter

START = datetime(2005, 1, 3, tzinfo=UTC)


def pass_time(clock: VirtualClock, seconds: float) -> None:
    clock.advance_to(clock.now() + timedelta(seconds=seconds))


@given(
    limit=st.integers(1, 8),
    calls=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9), st.floats(0, 90)), min_size=1, max_size=60),
)
@settings(max_examples=60, deadline=None)
async def test_no_window_holds_more_calls_than_the_limit(limit: int, calls: list[tuple[float, int, float]]) -> None:
    clock = VirtualClock(START)
    limiter = RateLimiter(clock, limit=limit)
    moments: list[float] = []
    refused = 0

    async def call(reserve: int, longest_s: float) -> None:
        nonlocal refused
        asked = clock.monotonic()
        try:
            await limiter.acquire(reserve=reserve, longest_s=longest_s)
        except RateLimited as error:
            refused += 1
            assert error.retry_after is not None and clock.monotonic() - asked + error.retry_after > longest_s  # noqa: PT017
        else:
            moments.append(clock.monotonic())
            assert clock.monotonic() - asked <= longest_s + 1e-6

    tasks = []
    for pause, reserve, longest_s in calls:
        tasks.append(asyncio.ensure_future(call(reserve, longest_s)))
        await asyncio.sleep(0)
        target = clock.now() + timedelta(seconds=pause)
        while clock.next_wake is not None and clock.next_wake <= target:
            clock.advance_to(clock.next_wake)
            for _ in range(3):
                await asyncio.sleep(0)
        clock.advance_to(target)
    while not all(task.done() for task in tasks):
        for _ in range(3):
            await asyncio.sleep(0)
        if clock.next_wake is not None:
            clock.advance_to(clock.next_wake)
    for task in tasks:
        task.result()
    assert len(moments) + refused == len(calls)
    assert all(later - earlier >= 60 - 1e-5 for earlier, later in zip(moments, moments[limit:], strict=False))


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "succeed", "fail", "abandon", "wait"]), st.integers(0, 9)), max_size=80
    )
)
@settings(max_examples=150, deadline=None)
def test_a_breaker_that_is_not_closed_has_at_most_one_call_under_way_that_began_since(
    steps: list[tuple[str, int]],
) -> None:
    clock = VirtualClock(START)
    breaker = CircuitBreaker("orders", clock, failures_max=3, open_s=10.0)
    under_way: list[tuple[int, str]] = []
    probes = 0
    for action, which in steps:
        if action == "enter":
            before = breaker.state
            try:
                under_way.append((breaker.enter(), breaker.state))
            except CircuitOpen as error:
                assert before != "closed" and error.retry_after is not None and 0 <= error.retry_after <= 10  # noqa: PT017
            else:
                assert before != "half_open"
                probes += breaker.state == "half_open"
        elif action == "wait":
            pass_time(clock, which)
        elif under_way:
            ticket, began = under_way.pop(which % len(under_way))
            {"succeed": breaker.succeeded, "fail": breaker.failed, "abandon": breaker.abandoned}[action](ticket)
            if began == "half_open":
                assert breaker.state == ("closed" if action == "succeed" else "open")
                probes -= 1
        assert probes == sum(began == "half_open" for _, began in under_way)
        assert probes <= 1 and (probes == 1) == (breaker.state == "half_open")


@given(st.lists(st.sampled_from(["change", "ask", "pass time", "turn"]), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
async def test_whoever_asks_after_a_change_that_was_reported_sees_it(steps: list[str]) -> None:
    clock = VirtualClock(START)
    cache = TtlCache(clock)
    truth = 0

    async def read() -> int:
        seen = truth
        await asyncio.sleep(0)  # the answer is on its way
        await asyncio.sleep(0)
        return seen

    async def ask() -> None:
        known = truth
        answer = await cache.get("account", read, ttl_s=5.0, tags=frozenset({"fills"}))
        assert answer >= known

    asking = []
    for step in steps:
        match step:
            case "change":
                truth += 1
                cache.invalidate("fills")
            case "ask":
                asking.append(asyncio.ensure_future(ask()))
            case "pass time":
                pass_time(clock, 2.0)
            case _:
                await asyncio.sleep(0)
    await asyncio.gather(*asking)
    stats = cache.stats()
    assert stats.misses + stats.saved == len(asking)


async def test_a_cache_may_be_told_from_another_thread() -> None:
    cache = TtlCache(VirtualClock(START))

    async def read() -> str:
        await asyncio.to_thread(cache.invalidate, "fills")
        return "old"

    assert await cache.get("account", read, ttl_s=5.0, tags=frozenset({"fills"})) == "old"
    assert cache.stats().entries == 0 and cache.stats().invalidated == 1


@pytest.mark.parametrize("began", ["cancelled before it began", "cancelled on its way"])
async def test_a_call_nobody_waits_for_is_cancelled(began: str) -> None:
    cache = TtlCache(VirtualClock(START))
    ended = asyncio.Event()

    async def read() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return "never"

    asker = asyncio.ensure_future(cache.get("account", read, ttl_s=5.0))
    for _ in range(1 if began == "cancelled before it began" else 5):
        await asyncio.sleep(0)
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    for _ in range(3):
        await asyncio.sleep(0)
    assert ended.is_set() or began == "cancelled before it began"

    async def again() -> str:
        return "account"

    assert await cache.get("account", again, ttl_s=5.0) == "account"
