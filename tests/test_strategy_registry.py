"""Strategies that other packages offer."""

from importlib.metadata import EntryPoint

import pytest

import trader_lib.strategy.registry as registry
from trader_lib.errors.taxonomy import Misused
from trader_lib.strategy.registry import build_strategy
from trader_lib.strategy.sma_cross import SmaCross


@pytest.fixture
def offered(monkeypatch):
    def offer(name: str, value: str) -> None:
        entry = EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry])

    return offer


def test_an_installed_strategy_is_found_by_its_entry_point(offered, monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registered = registry.strategy_names()  # by other tests of this process
    offered("theirs", "trader_lib.strategy.sma_cross:SmaCross")
    assert registry.strategy_names() == sorted([*registered, "theirs"])
    assert build_strategy("theirs", {"fast": "3", "slow": "9"}) == SmaCross(fast=3, slow=9)


@pytest.mark.parametrize("value", ["no_such_package:Thing", "trader_lib.strategy.sma_cross:Nothing"])
def test_a_broken_installed_strategy_says_what_is_wrong(offered, value):
    offered("theirs", value)
    with pytest.raises(Misused, match="installed strategy 'theirs' cannot be imported"):
        registry.load_strategy("theirs")


def test_a_registered_strategy_goes_before_an_installed_one(offered, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    offered("mine", "no_such_package:Thing")

    @registry.register
    class Mine(SmaCross):
        pass

    assert Mine.name == "mine"
    assert registry.load_strategy("mine") is Mine
