"""What both caches promise, in memory and in Redis; and what happens when Redis goes away."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import pytest

from tests.servers import RedisServer
from trader_lib.clock.clock import WallClock
from trader_lib.errors.taxonomy import Misconfigured
from trader_lib.resilience.cache import TtlCache
from trader_lib.resilience.redis_cache import RedisCache

NUMBERS = count(1)
ACCOUNT = frozenset({"account"})
Opener = Callable[[], TtlCache]


class Source:
    """Answers with the number of the question."""

    def __init__(self) -> None:
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def __call__(self) -> int:
        self.asked += 1
        answer = self.asked
        if self.gate is not None:
            await self.gate.wait()
        return answer


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[TtlCache]:
    if request.param == "memory":
        yield TtlCache(WallClock())
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    shared = RedisCache(WallClock(), server.url, f"account {next(NUMBERS)}", {"account": int})
    yield shared
    await shared.close()


async def test_an_answer_is_asked_for_once_until_it_is_old(cache: TtlCache) -> None:
    source = Source()
    assert [await cache.get("account", source, ttl_s=0.2, tags=ACCOUNT) for _ in range(3)] == [1, 1, 1]
    await asyncio.sleep(0.3)
    assert await cache.get("account", source, ttl_s=0.2, tags=ACCOUNT) == 2
    assert await cache.get("account", source, ttl_s=0, tags=ACCOUNT) == 3
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (2, 3)


async def test_many_who_ask_at_once_share_one_call(cache: TtlCache) -> None:
    source = Source()
    source.gate = asyncio.Event()
    asking = [asyncio.create_task(cache.get("account", source, ttl_s=60, tags=ACCOUNT)) for _ in range(10)]
    await asyncio.sleep(0.2)
    source.gate.set()
    assert await asyncio.gather(*asking) == [1] * 10
    assert cache.stats().joined == 9


@pytest.mark.parametrize("name", ["account", "key"])
async def test_what_is_invalidated_is_asked_for_again(cache: TtlCache, name: str) -> None:
    source = Source()
    assert await cache.get("key", source, ttl_s=60, tags=ACCOUNT) == 1
    cache.invalidate(name)
    assert await cache.get("key", source, ttl_s=60, tags=ACCOUNT) == 2
    cache.invalidate("something else")
    assert await cache.get("key", source, ttl_s=60, tags=ACCOUNT) == 2


async def test_an_answer_that_was_on_its_way_when_it_was_invalidated_is_not_kept(cache: TtlCache) -> None:
    source = Source()
    source.gate = asyncio.Event()
    asking = asyncio.create_task(cache.get("account", source, ttl_s=60, tags=ACCOUNT))
    await asyncio.sleep(0.2)
    cache.invalidate("account")
    source.gate.set()
    assert await asking == 1
    assert await cache.get("account", source, ttl_s=60, tags=ACCOUNT) == 2


async def test_a_failure_is_told_and_not_kept(cache: TtlCache) -> None:
    async def fail() -> int:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await cache.get("account", fail, ttl_s=60, tags=ACCOUNT)
    assert await cache.get("account", Source(), ttl_s=60, tags=ACCOUNT) == 1


# --- in Redis alone


def shared_by(server: RedisServer, scope: str, kinds: dict[str, Any] | None = None) -> RedisCache:
    return RedisCache(WallClock(), server.url, scope, kinds or {"account": int})


async def test_processes_share_answers_and_invalidations(redis_server: RedisServer) -> None:
    one, other, stranger = (shared_by(redis_server, scope) for scope in ("a", "a", "b"))
    source = Source()
    assert await one.get("account", source, ttl_s=60, tags=ACCOUNT) == 1
    assert await other.get("account", source, ttl_s=60, tags=ACCOUNT) == 1
    assert other.stats().saved == 1
    assert await stranger.get("account", source, ttl_s=60, tags=ACCOUNT) == 2
    other.invalidate("account")
    assert await one.get("account", source, ttl_s=60, tags=ACCOUNT) == 3
    for cache in (one, other, stranger):
        await cache.close()


async def test_without_redis_the_source_is_asked_and_nothing_old_comes_back(redis_server: RedisServer) -> None:
    one, other = (shared_by(redis_server, "down") for _ in range(2))
    source = Source()
    assert await one.get("account", source, ttl_s=60, tags=ACCOUNT) == 1
    reach = one._redis
    one._redis = RedisCache(WallClock(), "redis://127.0.0.1:1/0", "down", {})._redis  # Redis lives, and is not reached
    one.invalidate("account")
    one._redis = reach
    assert await one.get("account", source, ttl_s=60, tags=ACCOUNT) == 2, "what was untold was told first"
    assert await other.get("account", source, ttl_s=60, tags=ACCOUNT) == 2
    redis_server.kill()
    try:
        assert [await one.get("account", source, ttl_s=60, tags=ACCOUNT) for _ in range(2)] == [3, 4]
        assert one.fell_through == 2
    finally:
        redis_server.start()
    assert [await one.get("account", source, ttl_s=60, tags=ACCOUNT) for _ in range(2)] == [5, 5]
    for cache in (one, other):
        await cache.close()


async def test_an_answer_of_another_version_is_asked_for_again(redis_server: RedisServer) -> None:
    old, new = shared_by(redis_server, "v", {"account": str}), shared_by(redis_server, "v")

    async def words() -> str:
        return "not a number"

    assert await old.get("account", words, ttl_s=60, tags=ACCOUNT) == "not a number"
    assert await new.get("account", Source(), ttl_s=60, tags=ACCOUNT) == 1
    for cache in (old, new):
        await cache.close()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(Misconfigured, match="TRADER_CACHE__URL"):
        RedisCache(WallClock(), "nonsense", "a", {})
