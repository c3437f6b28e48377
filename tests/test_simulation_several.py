"""Two strategies of one account through the storms of the simulation: nothing doubled or lost, books that add up."""

from collections import defaultdict
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from loguru import logger

from tests.simulation.checks import check
from tests.simulation.plan import plan_of
from tests.simulation.world import Outcome, World, play
from trader_lib.journal.journal import SqliteJournal
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import FillRecorded, OrderIntended, PortfolioChanged, RiskDecided

SEEDS = range(24)


def shared(*, same_symbols: bool) -> Any:
    """The specification of a world, with two strategies in place of its one."""

    def spec(**fields: Any) -> SessionSpec:
        kind, symbols = fields.pop("strategy"), fields["symbols"]
        one = {"strategy": kind, "capital": "50%", "limits": fields["limits"]}
        own = (symbols, symbols) if same_symbols else (symbols[:1], symbols[1:])
        shares = [{"name": name, "symbols": its, **one} for name, its in zip(("early", "late"), own, strict=True)]
        return SessionSpec(strategies=shares, **fields)

    return spec


async def check_books(world: World) -> None:
    """All that must hold of one strategy, and that two books are one account."""
    await check(world)
    if world.result is None:
        return
    broken = world.outcome.broken
    with SqliteJournal(world.path) as journal:
        payloads = [event.payload for event in journal.read()]
    owner = {p.request.client_order_id: p.request.strategy for p in payloads if isinstance(p, OrderIntended)}
    held: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for payload in payloads:
        match payload:
            case FillRecorded(fill=fill):
                if (
                    fill.strategy not in {"early", "late"}
                    or owner.get(fill.client_order_id, fill.strategy) != fill.strategy
                ):
                    broken.append(f"owner: {fill.client_order_id} filled for {fill.strategy!r}")
                held[fill.strategy][fill.symbol] += fill.signed_qty
            case PortfolioChanged(strategies=several, positions=positions):
                for one in several:
                    if {p.symbol: p.qty for p in one.positions} != {s: q for s, q in held[one.strategy].items() if q}:
                        broken.append(f"book: {one.strategy} is told to hold {one.positions}")
                together: dict[str, Decimal] = defaultdict(Decimal)
                for one in several:
                    for position in one.positions:
                        together[position.symbol] += position.qty
                if {symbol: qty for symbol, qty in together.items() if qty} != {p.symbol: p.qty for p in positions}:
                    broken.append("sum: the books are not the account")
            case RiskDecided(checks=checks, request=request):
                if {one.scope for one in checks} != {"account", request.strategy}:
                    broken.append(f"limits: {request.client_order_id} was not checked twice")


def storm(seed: int, *, same_symbols: bool) -> Outcome:
    plan = plan_of(seed)
    both: Any = {"early": plan.strategy, "late": plan.strategy.model_copy(update={"seed": seed + 1_000_000})}
    patches = {"tests.simulation.world.SessionSpec": shared(same_symbols=same_symbols)}
    return play(replace(plan, strategy=both), {**patches, "tests.simulation.world.check": check_books})


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


def test_each_in_its_own_symbol() -> None:
    outcomes = [storm(seed, same_symbols=False) for seed in SEEDS]
    assert not [(one.seed, one.broken) for one in outcomes if one.broken]
    assert sum(one.orders for one in outcomes) > 100 and sum(one.restarts for one in outcomes)


def test_both_in_the_same_symbols() -> None:
    outcomes = [storm(seed, same_symbols=True) for seed in SEEDS]
    found = [(one.seed, broken) for one in outcomes for broken in one.broken]
    unexpected = [
        (seed, broken)
        for seed, broken in found
        if not (
            broken.startswith("doubled: (") and "'early-" in broken and "'late-" in broken
        )  # one each is as it should be
    ]
    assert not unexpected
    assert sum(one.fills for one in outcomes) > 100
