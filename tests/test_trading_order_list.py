"""Two order lists compare equal exactly when they are, and every difference is named."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from trader_lib.trading.order_list import OrderFill, OrderRecord, compare_order_lists, order_list_hash
from trader_lib.trading.orders import OrderSide, OrderStatus, OrderType

FIRST = datetime(2012, 3, 5, 5, tzinfo=UTC)
days = st.integers(0, 3).map(lambda count: FIRST + timedelta(days=count))
quantities = st.integers(1, 5).map(Decimal)
records = st.builds(
    OrderRecord,
    decided_at=days,
    symbol=st.sampled_from(["AAPL", "IBM"]),
    side=st.sampled_from(OrderSide),
    qty=quantities,
    type=st.sampled_from([OrderType.MARKET, OrderType.LIMIT]),
    status=st.sampled_from([OrderStatus.FILLED, OrderStatus.CANCELED]),
    filled_qty=quantities,
    fills=st.lists(st.builds(OrderFill, bar=days, qty=quantities, price=quantities), max_size=2).map(tuple),
)
lists = st.lists(records, max_size=6)


@given(lists, lists)
def test_equal_means_no_differences(left: list[OrderRecord], right: list[OrderRecord]) -> None:
    found = compare_order_lists(left, right)
    assert found.equal == (left == right) == (not found.differences)
    assert found.equal == (order_list_hash(left) == order_list_hash(right))


@given(lists, lists)
def test_every_order_is_in_exactly_one_row(left: list[OrderRecord], right: list[OrderRecord]) -> None:
    found = compare_order_lists(left, right)
    assert [row.left for row in found.rows if row.left] == left
    assert sorted(order.model_dump_json() for row in found.rows if (order := row.right)) == sorted(
        order.model_dump_json() for order in right
    )
    assert sum(found.counts.values()) == len(found.rows) == len(found.to_frame())
    assert all(row.sentence() for row in found.rows)
    assert found.summary()


@given(lists, lists)
def test_the_comparison_is_the_same_from_the_other_side(left: list[OrderRecord], right: list[OrderRecord]) -> None:
    there, back = compare_order_lists(left, right).counts, compare_order_lists(right, left).counts
    assert there == back | {"only_left": back["only_right"], "only_right": back["only_left"]}


@given(lists)
def test_records_survive_a_result_file(left: list[OrderRecord]) -> None:
    written = [record.model_dump(mode="json") for record in left]
    read = [OrderRecord.model_validate(row) for row in written]
    assert compare_order_lists(left, read).equal
