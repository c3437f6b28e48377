"""A sweep on a Dask cluster has this machine's rows, whatever becomes of the workers, and says what is not there."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trader_lib.app.cli import main
from trader_lib.errors.taxonomy import Misconfigured, Misused, RunFailed
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.research import cluster as room
from trader_lib.research.cluster import Cluster, joined
from trader_lib.research.sweep import SweepProgress, SweepResult, sweep
from trader_lib.research.walkforward import walk_forward
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.sma_cross import SmaCross

AXES = {"fast": range(2, 14), "slow": range(20, 30)}
DAYS = {"start": "2005-01-03", "end": "2007-12-31", "trials": False}


class Held(Strategy):
    """Long for some bars, out for as many; without compiled weights, and nowhere that a worker could import it from."""

    days: int = 3

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> np.ndarray:
        if self.days == 7:
            raise ValueError("no week")
        return np.where((np.arange(bars.n) // self.days) % 2 == 0, 0.9, 0.0)[:, None] * np.ones(len(bars.symbols))


@pytest.fixture(scope="module")
def prices() -> Bars:
    return sample_bars(["IBM"], end="2008-06-30")


@pytest.fixture(scope="module")
def alone(prices: Bars) -> SweepResult:
    return sweep(SmaCross, AXES, prices, workers=1, **DAYS)


@pytest.fixture(scope="module")
def there() -> Iterator[Cluster]:
    with joined(2) as found:
        assert found is not None
        yield found


def at_the_first_row(do: Callable[[], Any]) -> Callable[[SweepProgress], None]:
    """A report that does something once."""
    done: list[Any] = []

    def report(step: SweepProgress) -> None:
        if not done:
            done.append(True)
            do()

    return report


def kill(there: Cluster, count: int) -> None:
    for pid in list(there.client.run(os.getpid).values())[:count]:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_rows_of_a_cluster_are_those_of_this_machine(prices: Bars, alone: SweepResult, there: Cluster) -> None:
    far = sweep(SmaCross, AXES, prices, cluster=there, **DAYS)
    assert far.frame.equals(alone.frame) and far.complete
    assert far.estimate.device == "cluster" and "2 workers of a cluster" in far.estimate.sentence()


@pytest.mark.slow
def test_a_strategy_travels_with_its_code_and_its_refusals(prices: Bars, there: Cluster) -> None:
    days = {"days": [2, 3, 4, 0.5]}
    far, here = (sweep(Held, days, prices, **where, **DAYS) for where in ({"cluster": there}, {"workers": 1}))
    assert far.frame.equals(here.frame) and len(far.refused) == 1 and not far.estimate.compiled


@pytest.mark.slow
def test_what_a_strategy_raises_elsewhere_is_raised_here(prices: Bars, there: Cluster) -> None:
    with pytest.raises(ValueError, match="no week"):
        sweep(Held, {"days": [2, 7]}, prices, cluster=there, **DAYS)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_what_lost_workers_had_is_done_again(prices: Bars, alone: SweepResult, there: Cluster, count: int) -> None:
    """With both of them the bars are lost as well."""
    far = sweep(SmaCross, AXES, prices, cluster=there, report=at_the_first_row(lambda: kill(there, count)), **DAYS)
    assert far.complete and far.frame.equals(alone.frame)


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows_and_frees_the_cluster(
    prices: Bars, alone: SweepResult, there: Cluster, tmp_path: Path
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "rows"
    some = sweep(SmaCross, AXES, prices, cluster=there, folder=folder, report=at_the_first_row(stop), **DAYS)
    assert not some.complete and 0 < len(some.frame) < len(alone.frame)
    rest = sweep(SmaCross, AXES, prices, cluster=there, folder=folder, resume=True, **DAYS)
    assert rest.complete and rest.frame.equals(alone.frame)


@pytest.mark.slow
def test_a_cluster_that_goes_away_leaves_its_rows(
    prices: Bars, alone: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ALONE_S", 2.0)
    from distributed import LocalCluster

    folder = tmp_path / "rows"
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as own:
        gone = at_the_first_row(own.close)
        with pytest.raises(RunFailed, match=r"tcp://.* is gone: .* go on with resume") as failure:
            sweep(SmaCross, AXES, prices, cluster=own.scheduler_address, folder=folder, report=gone, **DAYS)
    part = failure.value.context["result"]
    assert isinstance(part, SweepResult) and not part.complete
    assert part.frame.equals(alone.frame.iloc[: len(part.frame)]) and len(part.frame)
    assert sweep(SmaCross, AXES, prices, folder=folder, resume=True, **DAYS).frame.equals(alone.frame)


@pytest.mark.slow
def test_a_walk_forward_chooses_the_same_on_a_cluster(prices: Bars, there: Cluster) -> None:
    windows = {"train": "1y", "test": "1y", "start": "2005-01-03", "end": "2007-12-31", "trials": False}
    far, here = (walk_forward(SmaCross, AXES, prices, **windows, **where) for where in ({"cluster": there}, {}))
    assert far.folds.equals(here.folds) and len(far.folds) == 2


@pytest.mark.slow
def test_a_worker_that_runs_something_else_is_refused(
    prices: Bars, there: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = room.runs_on() | {"numba": "0.1"}
    monkeypatch.setattr(room, "differences", lambda ours, theirs: compared(other, theirs))
    with pytest.raises(Misconfigured, match=r"Worker tls://.* numba is .* there and 0\.1 here"):
        room.check_workers(there.client, there.name, 1.0)
    monkeypatch.undo()
    monkeypatch.setattr("trader_lib.research.sweep.runs_on", lambda: other)  # as if it had joined later
    with pytest.raises(Misconfigured, match="would give other rows: numba is"):
        sweep(SmaCross, AXES, prices, cluster=there, **DAYS)


compared = room.differences


@pytest.mark.slow
def test_a_cluster_without_workers_is_refused(prices: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CONNECT_S", 1.0)
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, dashboard_address=None) as own,
        pytest.raises(Misconfigured, match=r"has no workers: start some with `dask worker tcp://"),
    ):
        sweep(SmaCross, AXES, prices, cluster=own.scheduler_address, **DAYS)


def test_a_share_is_refused_where_its_strategy_cannot_be_loaded(prices: Bars) -> None:
    lost = b"cnowhere_to_be_found\nStrategy\n."  # a pickle that names a module
    with pytest.raises(Misconfigured, match="cannot load the strategy: No module named 'nowhere_to_be_found'"):
        room.run_share(room.Share(lost, prices, True, room.runs_on()), range(1))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cluster": "host"}, "the address of a Dask scheduler"),
        ({"cluster": True}, "the address of a Dask scheduler"),
        ({"cluster": 2, "workers": 2}, "leave workers out"),
        ({"cluster": 2, "device": "cuda"}, "leave device out"),
    ],
)
def test_what_is_no_cluster_is_refused(prices: Bars, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Misused, match=sentence):
        sweep(SmaCross, AXES, prices, **given, **DAYS)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--cluster", "tcp://127.0.0.1:9"), 3, "cannot be joined"),
        (("--cluster", "host"), 2, "the address of a Dask scheduler"),
        (("--cluster", "2", "--workers", "2"), 2, "leave workers out"),
    ],
)
def test_the_command_refuses_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, sentence: str
) -> None:
    asked = ("sweep", "--grid", "fast=2:4", "--symbols", "IBM", *words, "--runs", str(tmp_path))
    assert main(asked) == code
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*sweep*"))
