"""Every payload type survives the journal's JSON, byte for byte and field for field."""

import types
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel, JsonValue

from trader_lib.trading.events import PAYLOADS, Event, Payload
from trader_lib.trading.orders import OrderRequest, ReplaceRequest

text = st.text(st.characters(codec="utf-8"), max_size=12)
moments = st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC))
decimals = st.decimals("0.000000001", "99999", places=9)
requests = st.builds(
    OrderRequest,
    symbol=st.from_regex(r"\A[A-Z][A-Z0-9.]{0,9}\Z"),
    side=st.sampled_from(["buy", "sell"]),
    qty=decimals,
    client_order_id=st.text(min_size=1, max_size=20),
    purpose=st.sampled_from(["entry", "exit"]),
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: text,
    int: st.integers(-(2**53), 2**53),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    Decimal: decimals,
    datetime: moments,
    AwareDatetime: moments,
    type(None): st.none(),
    OrderRequest: requests,
    ReplaceRequest: st.builds(
        ReplaceRequest,
        client_order_id=st.text(min_size=1, max_size=20),
        stop_price=st.decimals(min_value=Decimal("0.01"), max_value=Decimal(99999), places=2),
    ),
    JsonValue: st.one_of(
        st.none(), st.booleans(), st.integers(-1000, 1000), text, st.lists(st.integers(-(2**53), 2**53), max_size=2)
    ),
}


def values_of(annotation: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Any value that a field with this annotation may hold."""
    if annotation in LEAVES:
        return LEAVES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0], depth)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in {Union, types.UnionType}:
        return st.one_of([values_of(argument, depth) for argument in arguments])
    if origin is tuple:
        size = 2 if depth < 2 else 0
        return st.lists(values_of(arguments[0], depth + 1), max_size=size).map(tuple) if size else st.just(())
    if origin is not None and issubclass(origin, Mapping):
        return st.dictionaries(text, values_of(arguments[1], depth + 1), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return st.sampled_from(annotation)
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel), annotation
    return models_of(annotation, depth + 1)


def models_of(model: type[BaseModel], depth: int = 0) -> st.SearchStrategy[Any]:
    fields = {name: values_of(field.annotation, depth) for name, field in model.model_fields.items()}
    return st.builds(model, **fields)


@pytest.mark.parametrize("name", sorted(PAYLOADS))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_payload_round_trips(name: str, data: st.DataObject) -> None:
    payload: Payload = data.draw(models_of(PAYLOADS[name]))
    event = Event(
        id="e",
        seq=data.draw(st.integers(1, 2**53)),
        time=data.draw(moments),
        recorded_at=data.draw(moments),
        correlation_id=data.draw(text),
        causation_id=data.draw(st.none() | text),
        source="test",
        session_id="s",
        payload=payload,
    )
    written = event.to_json()
    read = Event.from_json(written)
    assert read == event
    assert type(read.payload) is PAYLOADS[name]
    assert read.to_json() == written
    assert orjson.dumps(orjson.loads(written), option=orjson.OPT_SORT_KEYS) == written, "not canonical"
    assert Event.from_row(event.envelope(), payload.to_json()) == event


def test_every_payload_says_whether_it_is_an_input_or_an_output() -> None:
    assert {payload.kind for payload in PAYLOADS.values()} == {"input", "output"}
    assert all(PAYLOADS[payload.type] is payload for payload in PAYLOADS.values())


def test_every_payload_is_documented_and_frozen() -> None:
    for payload in PAYLOADS.values():
        assert payload.__doc__, f"{payload.__name__} needs a sentence"
        assert payload.model_config["frozen"], f"{payload.__name__} can be changed after it was published"
