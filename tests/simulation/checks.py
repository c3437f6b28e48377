"""What must hold after every seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from trader_lib.exchange.book import OrderEvent
from trader_lib.journal.journal import SqliteJournal
from trader_lib.replay.replay import replay
from trader_lib.trading.events import (
    AccountReported,
    Event,
    FillRecorded,
    OrderAcknowledged,
    OrderAdopted,
    OrderFailed,
    OrderIntended,
    Payload,
    ReplaceIntended,
    SessionEnded,
    TradeUpdated,
)
from trader_lib.trading.orders import SIDE_SIGN, Order

if TYPE_CHECKING:
    from tests.simulation.world import World

EXPOSURE_SLACK = 1.03  # prices move between a decision and its fill
ORDER_SHARE = 0.45  # of equity, the largest order: an order in each symbol may have filled, and nobody was told


class Read:
    """A journal that was read once."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def read(self, from_seq: int = 0, types: Collection[type[Payload]] = ()) -> Iterator[Event]:
        kinds = tuple(types)
        return (e for e in self._events if e.seq >= from_seq and (not kinds or isinstance(e.payload, kinds)))


async def check(world: World) -> None:
    """Lay the journal beside the exchange's record, and play it again."""
    outcome, broken = world.outcome, world.outcome.broken
    with SqliteJournal(world.path) as journal:
        events = list(journal.read())
        verification, outcome.journal_hash = journal.verify(), journal.last_hash[:16]
    if not verification.ok:
        broken.append(f"journal: {verification.reason}")
    outcome.faults["disk refused a write"] += world.record.refused
    if world.result is None:
        return
    if not world.record.refused:
        broken += [f"agent failed: {failure}" for failure in world.record.failures]
    found = world.result.reconciliation.discrepancies  # repaired or not: at the end nothing may be left to repair
    broken += [f"reconciliation: {one.sentence}" for one in found if one.kind != "cash"]
    broken += [f"down: {health.agent}" for health in world.result.health if health.state == "down"]
    _check_orders(world, events)
    _check_groups(world, events)
    _check_sight(world, events)
    _check_fills(world, events)
    _check_limits(world)
    result = await replay(Read(events), strategy=world.plan.strategy)  # type: ignore[arg-type]
    outcome.compared = sum(result.compared.values())
    if not result.agrees:
        broken.append(f"replay: {result.sentence()}")
        return
    portfolio = result.agents["portfolio"]
    drift = abs(portfolio.state.cash_drift)  # type: ignore[attr-defined]
    if drift > Decimal("0.01") * outcome.repaired:
        broken.append(f"cash: our fills are {drift} USD away from the exchange's account")


def _check_orders(world: World, events: list[Event]) -> None:
    outcome, broken = world.outcome, world.outcome.broken
    outcome.events = len(events)
    broken += [f"left open: {order.client_order_id}" for order in world.exchange.orders()]
    silent = _without_outcome(events)
    broken += [f"unresolved: nobody knows what became of {name}" for name in sorted(silent)]
    intents = [e.payload.request.client_order_id for e in events if isinstance(e.payload, OrderIntended)]
    broken += [f"doubled: {name} was intended {n} times" for name, n in Counter(intents).items() if n > 1]
    decisions: dict[Any, list[str]] = defaultdict(list)
    placed = world.exchange.orders(open_only=False)
    outcome.orders = len(placed)
    moved = {e.payload.request.client_order_id for e in events if isinstance(e.payload, ReplaceIntended)}
    legs = {leg.id for order in placed for leg in order.legs}
    for order in placed:
        if order.client_order_id in moved & world.record.moves.keys() or _was_leg(world, order, legs):
            continue
        intent = world.record.safe.get(order.client_order_id)
        if intent is None or order.client_order_id not in intents:
            broken.append(f"unexplained: {order.client_order_id} has no intent")
            continue
        decisions[order.symbol, intent.decided_at, intent.request.purpose].append(order.client_order_id)
    broken += [f"doubled: {key} led to {names}" for key, names in decisions.items() if len(names) > 1]
    if not world.plan.very_late:
        given_up = {e.payload.client_order_id for e in events if _gives_up(e)}
        early = sorted(given_up & {order.client_order_id for order in placed})
        broken += [f"given up too early: {name} was said not to have been sent" for name in early]


def _was_leg(world: World, order: Order, legs: set[str]) -> bool:
    """Whether an order was a leg, and another one has taken its place."""
    while order.replaced_by is not None:
        order = world.exchange.order(order.replaced_by)
    return order.id in legs


def _check_groups(world: World, events: list[Event]) -> None:
    """Legs are exits of our own: whatever they fill is booked so, and nobody takes them for a stranger's."""
    entries = {leg.id: order for order in world.exchange.orders(open_only=False) for leg in order.legs}
    ours = {order.id for order in entries.values()} | entries.keys()
    for event in events:
        match event.payload:
            case FillRecorded(fill=fill) if fill.order_id in entries:
                entry = entries[fill.order_id].client_order_id
                if (fill.purpose, fill.parent) != ("exit", entry):
                    world.outcome.broken.append(
                        f"group: what a leg of {entry} filled was booked as {fill.purpose} of {fill.parent!r}"
                    )
            case OrderAdopted(order=order) if order.id in ours:
                world.outcome.broken.append(f"group: {order.client_order_id} was taken for a stranger's")


def _check_sight(world: World, events: list[Event]) -> None:
    """An order that the broker's own words had made wrong before it was intended."""
    said: dict[str, Order] = {}
    told: dict[str, Decimal] = defaultdict(Decimal)
    strategies: dict[str, str] = {}  # by client order id of what was intended
    owners: dict[str, str] = {}  # the strategy, by the broker's id of an order or a leg
    firsts: dict[str, str] = {}  # the broker's id of what began a chain of replacements, by that of what followed
    for event in events:
        match event.payload:
            case FillRecorded(fill=fill):
                told[firsts.get(fill.order_id, fill.order_id)] += fill.qty
            case OrderAcknowledged(client_order_id=name, order=order):
                for part in (order, *order.legs):
                    before = part.replaces or part.id
                    first = firsts[part.id] = firsts.get(before, before)
                    owners[part.id] = strategies.get(name, "")
                    said[first] = max(part, said.get(first, part), key=lambda one: one.filled_qty)
            case OrderIntended(request=request):
                strategies[request.client_order_id] = request.strategy
                untold = sum(
                    SIDE_SIGN[part.side]
                    * SIDE_SIGN[request.side]
                    * max(part.filled_qty - told[firsts[part.id]], Decimal(0))
                    for part in said.values()
                    if (part.symbol, owners[part.id]) == (request.symbol, request.strategy)
                )
                if untold > 0 if request.purpose == "exit" else untold != 0:
                    world.outcome.broken.append(
                        f"blind: {request.client_order_id} was sent when {abs(untold)} shares were known to be filled "
                        "and not counted"
                    )


def _check_fills(world: World, events: list[Event]) -> None:
    outcome, broken, exchange = world.outcome, world.outcome.broken, world.exchange
    fills = [event.payload.fill for event in events if isinstance(event.payload, FillRecorded)]
    outcome.fills = len(fills)
    outcome.repaired = sum(fill.execution_id.startswith("repair:") for fill in fills)
    theirs: dict[str, Decimal] = defaultdict(Decimal)
    for execution in world.executions:
        assert execution.qty is not None
        theirs[execution.order.id] += execution.qty
    ours: dict[str, Decimal] = defaultdict(Decimal)
    held: dict[str, Decimal] = defaultdict(Decimal)
    for fill in fills:
        ours[fill.order_id] += fill.qty
        held[fill.symbol] += fill.signed_qty
    for order_id in sorted(theirs.keys() | ours.keys()):
        if theirs[order_id] != ours[order_id]:
            broken.append(f"fills: order {order_id} filled {theirs[order_id]}, we counted {ours[order_id]}")
    names = Counter(fill.execution_id for fill in fills)
    broken += [f"fills: {name} was counted {count} times" for name, count in names.items() if count > 1]

    truth = {position.symbol: position.qty for position in exchange.positions()}
    mine = {symbol: qty for symbol, qty in held.items() if qty}
    if mine != truth:
        broken.append(f"positions: we hold {mine}, the exchange says {truth}")
    account = exchange.account()
    reported = [event.payload.cash for event in events if isinstance(event.payload, AccountReported)]
    if not reported or reported[-1] != account.cash:
        broken.append(f"cash: we report {reported[-1:]}, the exchange {account.cash}")
    ended = [event.payload.equity for event in events if isinstance(event.payload, SessionEnded)]
    if ended != [world.equity_told]:
        broken.append(f"end: the session ended with {ended} USD, the exchange said {world.equity_told}")
    if world.result is not None and ended != [world.result.equity_end]:
        broken.append(f"end: the session ended with {ended} USD, its result says {world.result.equity_end}")


def _check_limits(world: World) -> None:
    broken, limits = world.outcome.broken, world.plan.limits
    per_decision = Counter(
        world.record.safe[order.client_order_id].decided_at
        for order in world.exchange.orders(open_only=False)
        if order.client_order_id in world.record.safe
    )
    bound = limits.max_orders
    for decided_at, count in per_decision.items():
        if bound is not None and count > bound:
            broken.append(f"limit: {count} orders followed from the bar of {decided_at}, {bound} allowed in a minute")
    if world.plan.very_late:
        return
    peak, most = _largest_position(world.executions), Decimal(str(limits.max_position_qty))
    if peak > most:
        broken.append(f"limit: {peak} shares were held, {most} allowed")
    gross = limits.max_gross_exposure
    if gross is None:
        return
    allowed = gross * EXPOSURE_SLACK + (0.0 if world.plan.is_told else ORDER_SHARE * len(world.plan.symbols))
    if world.largest_exposure > allowed:
        broken.append(f"limit: the exposure was {world.largest_exposure:.3f} of equity, {allowed:.3f} allowed")


def _largest_position(executions: list[OrderEvent]) -> Decimal:
    return max((abs(event.position_qty or Decimal(0)) for event in executions), default=Decimal(0))


def _without_outcome(events: list[Event]) -> set[str]:
    """Orders that were to be sent, and of which neither the broker's record nor a definite failure was ever heard."""
    waiting: set[str] = set()
    for event in events:
        match event.payload:
            case OrderIntended(request=request):
                waiting.add(request.client_order_id)
            case OrderAcknowledged(order=order) | TradeUpdated(order=order):
                waiting.discard(order.client_order_id)
            case OrderFailed(client_order_id=name, outcome=outcome) if outcome != "unknown":
                waiting.discard(name)
    return waiting


def _gives_up(event: Event) -> bool:
    return isinstance(event.payload, OrderFailed) and event.payload.outcome == "not_sent"
