"""A graphics card's rows are the processor's: in numba's simulator, in what is compiled, and where there is no card."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from trader_lib.errors.extras import missing_packages
from trader_lib.errors.taxonomy import Misconfigured, Misused
from trader_lib.market.sample import sample_bars
from trader_lib.research import sweep as sweep_module
from trader_lib.research.sweep import runs_on_card, sweep
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.rsi_reversion import RsiReversion
from trader_lib.strategy.signals import PointSignal
from trader_lib.strategy.sma_cross import SmaCross
from trader_lib.strategy.vol_target import VolTarget

needs_extra = pytest.mark.skipif(bool(missing_packages("gpu")), reason="the extra gpu is not installed")
SIMULATED = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}


def test_rows_of_a_simulated_card_are_those_of_the_processor() -> None:
    command = [sys.executable, "-m", "tests.tools.card_cases", "6", "160"]
    done = subprocess.run(command, env=SIMULATED, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("6 cases are equal")


@contextmanager
def without_a_card() -> Iterator[None]:
    """numba-cuda asks a card what to compile for: here an H100 or H200 is assumed."""
    import numba.cuda.dispatcher as dispatcher

    with patch.object(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0))):
        yield


def compiled_for_a_card(strategy: Strategy, symbols: int) -> str:
    """The kernel's PTX for compute capability 9.0."""
    from numba import cuda, typeof

    from trader_lib.research.backtest import agreed
    from trader_lib.research.card import kernel_of, no_share, unfused
    from trader_lib.research.combinations import combinations
    from trader_lib.research.ledger import REFUSAL_ROW
    from trader_lib.research.many import Runner
    from trader_lib.rules.numbers import compiled_part

    bars = sample_bars(["AAPL", "IBM"][:symbols], start="2006-01-03", end="2006-03-31")
    runner = Runner(combinations(type(strategy), [strategy.model_dump()]), bars, 0, agreed())
    offer = strategy.compiled_weights
    assert offer is not None and isinstance(offer.compiled, PointSignal)
    signal = offer.compiled
    kernel, series = kernel_of(compiled_part(signal.points), symbols, signal.state_size), np.zeros((bars.n, 2, symbols))
    taken = (runner.ground, series, runner.shared, np.empty(0, REFUSAL_ROW), no_share(signal, 1, len(offer.parameters)))
    with unfused(), without_a_card():
        ptx, _ = cuda.compile(kernel, tuple(map(typeof, taken)), device=False, abi="numba", cc=(9, 0), output="ptx")
    return str(ptx)


@pytest.mark.slow
@needs_extra
@pytest.mark.parametrize("strategy", [SmaCross(), RsiReversion()], ids=lambda strategy: strategy.name)
def test_nothing_of_the_rules_is_compiled_into_fused_operations(strategy: Strategy) -> None:
    from trader_lib.research.card import fused_in

    ptx = compiled_for_a_card(strategy, 1)
    assert ptx.count("mul.f64") + ptx.count("mul.rn.f64") > 100, "the rules multiply"
    assert fused_in(ptx) == [], "powers and logarithms of a card, which are not the processor's, would show here too"


@pytest.mark.slow
@needs_extra
def test_the_search_for_fused_operations_finds_them() -> None:
    """What numba-cuda compiles when it is left alone, and with the option."""
    from numba import cuda, float64

    from trader_lib.research.card import ensure_unfused, fused_in, unfused

    def product_and_sum(a: float, b: float, c: float) -> float:
        return a * b + c

    signature = float64(float64, float64, float64)
    left_alone, _ = cuda.compile(product_and_sum, signature, device=True, cc=(9, 0), output="ptx")
    with unfused():
        separate, _ = cuda.compile(product_and_sum, signature, device=True, cc=(9, 0), output="ptx")
    assert len(fused_in(left_alone)) == 1 and fused_in(separate) == []
    with pytest.raises(Misconfigured, match=r"multiplies and adds in one step \(fma"):
        ensure_unfused(SimpleNamespace(inspect_asm=lambda: {"signature": left_alone}))


def test_a_sweep_says_why_it_cannot_run_on_a_card() -> None:
    prices, axes = sample_bars(["IBM"], start="2006-01-03", end="2006-12-29"), {"fast": [2, 3], "slow": [5]}
    with pytest.raises(Misused, match=r"No device is called 'cdua'. Did you mean 'cuda'\?"):
        sweep(SmaCross, axes, prices, device="cdua")
    with pytest.raises(Misused, match=r"two parts .*; 'vol_target' over 1 is not so: sweep with device='cpu'"):
        sweep(VolTarget, {"target": [0.1]}, prices, device="cuda")
    with (
        patch.object(sweep_module, "why_no_card", lambda: "there is no CUDA device here."),
        pytest.raises(Misconfigured, match=r"cannot run on a graphics card: there is no CUDA device here. Or sweep"),
    ):
        sweep(SmaCross, axes, prices, device="cuda")


def test_a_card_is_used_where_there_is_one_and_enough_to_do() -> None:
    with patch.object(sweep_module, "why_no_card", lambda: None):
        assert runs_on_card("auto", SmaCross(), True, 10**10, 1)
        assert not runs_on_card("auto", SmaCross(), True, 10**9, 1), "compiling would take longer"
        assert not runs_on_card("auto", SmaCross(), False, 10**10, 1), "compiled weights were not wanted"
        assert not runs_on_card("auto", SmaCross(), True, 10**10, 100), "too many symbols for a thread"
        assert runs_on_card("cuda", SmaCross(), True, 1, 1)
    with patch.object(sweep_module, "why_no_card", lambda: "there is none."):
        assert not runs_on_card("auto", SmaCross(), True, 10**10, 1)
