"""Orders that cannot be valid cannot be built, whatever one tries."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trader_lib.rules.numbers import to_decimal, to_float
from trader_lib.trading.capability import capability_table
from trader_lib.trading.orders import (
    ORDER_TYPE_CODE,
    SIDE_SIGN,
    OrderRequest,
    OrderSide,
    OrderType,
    TimeInForce,
    client_order_id,
    decimal_text,
    decimals_of,
)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_number_has_one_spelling(value: Decimal) -> None:
    value = value.normalize()  # to the 28 digits of the default context
    text = decimal_text(value)
    assert Decimal(text) == value
    assert "E" not in text
    assert text != "-0"
    assert "." not in text or not text.endswith("0")
    assert decimal_text(Decimal(text)) == text


@given(
    st.sampled_from(OrderSide),
    st.decimals("0.000000001", "999999", places=9),
    st.decimals("0.01", "99999", places=2),
    st.sampled_from(sorted(ORDER_TYPE_CODE)),
)
def test_valid_orders_cross_to_float_and_back_and_round_trip(
    side: OrderSide, qty: Decimal, price: Decimal, order_type: OrderType
) -> None:
    request = OrderRequest(
        symbol="BRK.B",
        side=side,
        qty=qty,
        type=order_type,
        limit_price=price if "limit" in order_type.value else None,
        stop_price=price if "stop" in order_type.value else None,
        client_order_id="c",
    )
    assert to_decimal(to_float(request.qty), 9) == qty
    assert request.signed_qty == SIDE_SIGN[side] * qty
    assert OrderRequest.model_validate_json(request.model_dump_json()) == request
    assert OrderRequest.model_validate(request.model_dump()) == request


@given(st.text(max_size=12))
def test_only_symbols_pass_as_symbols(symbol: str) -> None:
    fits = (
        1 <= len(symbol) <= 10
        and symbol[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        and all(letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789." for letter in symbol)
    )
    try:
        OrderRequest(symbol=symbol, side=OrderSide.BUY, qty=Decimal(1), client_order_id="c")
    except ValidationError:
        assert not fits
    else:
        assert fits


@given(st.decimals("0.0001", "10000", places=6))
def test_sub_penny_prices_are_refused(price: Decimal) -> None:
    allowed = decimals_of(price) <= (2 if price >= 1 else 4)
    fields = {"symbol": "A", "side": "buy", "qty": 1, "type": "limit", "limit_price": price, "client_order_id": "c"}
    if allowed:
        assert OrderRequest.model_validate(fields).limit_price == price
    else:
        with pytest.raises(ValidationError, match="sub-penny"):
            OrderRequest.model_validate(fields)


def test_a_refusal_shows_no_other_field() -> None:
    with pytest.raises(ValidationError) as refusal:
        OrderRequest.model_validate(
            {"symbol": "AAPL", "side": "buy", "qty": "-1", "client_order_id": "my-own-secret-name"}
        )
    assert "my-own-secret-name" not in str(refusal.value)


def test_protective_exits_are_accepted_on_both_sides() -> None:
    for side, limit, stop in (("sell", "110", "109.99"), ("buy", "90", "90.01")):
        exit_request = OrderRequest.model_validate(
            {
                "symbol": "AAPL",
                "side": side,
                "qty": 5,
                "type": "limit",
                "limit_price": limit,
                "stop_loss_price": stop,
                "order_class": "oco",
                "time_in_force": "gtc",
                "client_order_id": "c",
                "purpose": "exit",
            }
        )
        assert exit_request.time_in_force is TimeInForce.GTC


def test_client_order_id_is_the_same_in_every_time_zone_and_unique_by_decision() -> None:
    decided = datetime(2024, 3, 1, 21, tzinfo=UTC)
    local = decided.astimezone(timezone(timedelta(hours=-5)))
    ids = {
        client_order_id(session, strategy, symbol, decided + timedelta(microseconds=shift), purpose, n)
        for session in ("a", "b")
        for strategy in ("x", "x_", "x-")
        for symbol in ("AAPL", "IBM")
        for shift in (0, 1)
        for purpose in ("entry", "exit")
        for n in (0, 1)
    }
    assert len(ids) == 96
    assert client_order_id("a", "x", "AAPL", local, "entry", 0) in ids


def test_documentation_shows_the_table_of_capabilities_as_it_is() -> None:
    shown = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert capability_table() in shown, "put the output of capability_table() into docs/operations.md"
