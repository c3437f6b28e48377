"""Paper sessions that look like rehearsals and are none, and folders of live runs that ask for more than they had."""

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loguru import logger

from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.app.cli import main
from trader_lib.app.live import check_live, rehearsal_refusals
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import WallClock
from trader_lib.clock.ids import UniqueIds
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import open_journal
from trader_lib.runs.parameters import RunParameters, resolved
from trader_lib.runs.rehearsal import judge
from trader_lib.runs.result import RunResult
from trader_lib.runs.resume import started_now
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import AgentFailed, SessionStarted

STRATEGY = """
from trader_lib.strategy.contract import Strategy

SHARE = 0.4


class Holds(Strategy):
    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars):
        return bars.frame("close").notna() * SHARE / len(bars.symbols)
"""
DIES = STRATEGY.replace("        return bars", "        raise RuntimeError('at the first bar')\n        return bars")


async def on_paper(spec: SessionSpec, run: RunFolder) -> SessionResult:
    """A session at Alpaca's paper account, in whose place the embedded exchange stands."""
    bars = recent_minutes()
    with ExchangeServer(Exchange(bars, bars.n - 80), key_id="key", secret_key="secret") as server:
        settings = load_settings("paper", environ={}, env_file=None, overrides={"broker": as_alpaca(server)})
        async with beside(goes_on(server, 0.5)):
            return await run_session(spec, settings, journal_path=run.journal)


def rehearse(source: str, folder: Path, bars: int = 3) -> tuple[RunStore, SessionSpec]:
    """A store with one paper session, of a strategy in a file of the user's own."""
    file = folder / "own.py"
    file.write_text(source)
    what = {"strategy": f"{file}:Holds", "symbols": ("AAPL", "IBM"), "timeframe": "1Min", "source": "alpaca"}
    spec = SessionSpec.model_validate({**what, "bars_max": bars})
    store = RunStore(folder / "runs")
    run = store.create("paper")
    logger.disable("trader_lib")
    try:
        session = asyncio.run(on_paper(spec, run))
    finally:
        logger.enable("trader_lib")
    run.write_result(
        RunResult.model_validate(
            {"kind": "paper", "status": session.status, "parameters": {}, "versions": {}}
            | {"started_at": session.started_at, "ended_at": session.ended_at}
        )
    )
    return store, spec


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, SessionSpec]:
    return rehearse(STRATEGY, tmp_path_factory.mktemp("rehearsed"))


@pytest.fixture
def copied(rehearsed: tuple[RunStore, SessionSpec], tmp_path: Path) -> tuple[RunStore, SessionSpec, RunFolder]:
    """A rehearsal of one's own, to do something to."""
    store, spec = rehearsed
    shutil.copytree(store.path, tmp_path / "runs")
    mine = RunStore(tmp_path / "runs")
    return mine, spec, mine.runs("paper")[0]


def against(store: RunStore, spec: SessionSpec) -> str:
    """What is said about the only session, which does not count."""
    none, why = rehearsal_refusals(store, spec)
    assert none.startswith("There is no reconciled paper session")
    lead = f"The paper session {store.runs('paper')[0].name} does not count: "
    assert why.startswith(lead)
    return why.removeprefix(lead)


def test_a_session_that_traded_the_same_and_ended_by_itself_counts(rehearsed: tuple[RunStore, SessionSpec]) -> None:
    assert rehearsal_refusals(*rehearsed) == []


def test_a_strategy_that_died_at_the_first_bar_was_not_rehearsed(tmp_path: Path) -> None:
    store, spec = rehearse(DIES, tmp_path, bars=1)
    said = rehearsal_refusals(store, spec)
    assert any("its strategy agent failed" in line for line in said), said
    assert any("none of its orders was placed" in line for line in said), said
    run = store.runs("paper")[0]
    forged = run.result().model_copy(update={"status": "completed"})  # a report can say what it likes
    run.write_result(forged)
    assert len(judge(run, started_now(spec)).objections) == 2


@pytest.mark.parametrize("edited", [STRATEGY.replace("0.4", "4.0"), f"{STRATEGY}\n# a comment\n"])
def test_a_strategy_that_was_rewritten_since_was_not_rehearsed(
    edited: str, rehearsed: tuple[RunStore, SessionSpec]
) -> None:
    store, spec = rehearsed
    file = Path(spec.strategy.partition(":")[0])
    try:
        file.write_text(edited)
        assert "the source of holds was sha256:" in against(store, spec)
    finally:
        file.write_text(STRATEGY)
    assert rehearsal_refusals(store, spec) == []


def test_a_helper_that_was_rewritten_since_was_not_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "own_share.py"
    helper.write_text("SHARE = 0.4\n")
    store, spec = rehearse(STRATEGY.replace("SHARE = 0.4", "from own_share import SHARE"), tmp_path)
    assert rehearsal_refusals(store, spec) == []
    helper.write_text("SHARE = 4.0\n")
    assert "the source of holds" in against(store, spec)


def test_a_broken_chain_is_no_evidence(copied: tuple[RunStore, SessionSpec, RunFolder]) -> None:
    store, spec, run = copied
    connection = sqlite3.connect(run.journal)
    edited = connection.execute(
        "UPDATE events SET payload = replace(payload, '\"ok\":true', '\"ok\":true ') WHERE type = 'reconciled'"
    )
    assert edited.rowcount
    connection.commit()
    connection.close()
    assert "its journal does not verify: " in against(store, spec)


def test_a_journal_without_its_end_is_no_evidence(copied: tuple[RunStore, SessionSpec, RunFolder]) -> None:
    store, spec, run = copied
    connection = sqlite3.connect(run.journal)
    connection.execute("DELETE FROM events WHERE type = 'session_ended'")
    connection.commit()
    connection.close()
    assert "its journal has no end" in against(store, spec)
    run.journal.unlink()
    assert "it cannot be read: it has no journal" in against(store, spec)
    run.journal.write_bytes(b"not a journal")
    assert "it cannot be read: " in against(store, spec)


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_a_session_that_did_not_come_to_its_own_end_is_no_rehearsal(
    status: str, copied: tuple[RunStore, SessionSpec, RunFolder]
) -> None:
    store, spec, run = copied
    run.write_result(run.result().model_copy(update={"status": status}))
    assert ("it was stopped" if status == "interrupted" else f"its result says {status}") in against(store, spec)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("symbols", ("AAPL", "IBM", "MSFT")),
        ("timeframe", "5Min"),
        ("leverage", 2.0),
        ("fractional", True),
    ],
)
def test_another_session_was_not_rehearsed(name: str, value: object, rehearsed: tuple[RunStore, SessionSpec]) -> None:
    store, spec = rehearsed
    assert f"{name} was " in against(store, spec.model_copy(update={name: value}))
    assert rehearsal_refusals(store, spec.model_copy(update={"bars_max": None, "seed": 7})) == []


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("__version__", "99.0.0", "and this is 99.0.0"),
        ("platform.python_version", lambda: "3.99.1", "and this is 3.99"),
    ],
)
def test_another_version_was_not_rehearsed(
    attribute: str,
    value: object,
    said: str,
    rehearsed: tuple[RunStore, SessionSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"trader_lib.runs.rehearsal.{attribute}", value)
    assert said in against(*rehearsed)


def test_a_vital_agent_that_failed_once_is_named(copied: tuple[RunStore, SessionSpec, RunFolder]) -> None:
    store, spec, run = copied
    for agent in ("monitor", "execution"):
        publish(run, AgentFailed(agent=agent, error="KeyError: 1", restarts=1), source=agent)
        if agent == "monitor":
            assert rehearsal_refusals(store, spec) == []
    assert against(store, spec) == "its execution agent failed."


# ---- a live run that is resumed: its folder may have been written by anybody

LIMITS = {
    "max_order_notional": 60_000,
    "max_position_notional": 60_000,
    "max_gross_exposure": 1.5,
    "max_daily_loss": 0.5,
}
OWN = {f"TRADER_RISK__{name.upper()}": str(value) for name, value in LIMITS.items()}


class LiveRun:
    """The folder of a live session that died, and the environment of the operator who resumes it."""

    def __init__(self, store: RunStore, spec: SessionSpec, server: ExchangeServer, tell: pytest.MonkeyPatch) -> None:
        for name in [name for name in os.environ if name.startswith(("TRADER_", "APCA_"))]:
            tell.delenv(name)
        broker = {f"TRADER_BROKER__{name.upper()}": value for name, value in as_alpaca(server).items()}
        for name, value in (broker | OWN | {"TRADER_PROFILE": "live", "TRADER_RUNS__PATH": str(store.path)}).items():
            tell.setenv(name, value)
        self.server, self.run = server, store.create("live")
        given = spec.model_dump(include={"strategy", "symbols", "timeframe", "source", "bars_max"}, mode="json")
        self.asked = RunParameters.model_validate(resolved(given, load_settings("live", env_file=None)))
        self.parameters = self.asked.values() | {"broker": "alpaca", "transport": "http"}

    def write(
        self, *, stage: str = "live", account: str = "SIMULATED", recorded: object = None, **asked: object
    ) -> None:
        """Folder and journal, as a session leaves them. recorded: limits in the journal. asked: else in params.json."""
        began = started_now(self.asked.spec)
        parameters = dict(began.parameters) | ({"limits": recorded} if recorded else {})
        update = {"stage": stage, "account": account, "parameters": parameters}
        publish(self.run, SessionStarted.model_validate(began.model_dump(mode="json") | update))
        self.run.write_params({"kind": "live", "parameters": self.parameters | asked})

    def limits(self, **raised: object) -> dict[str, object]:
        return {**self.parameters["limits"], **raised}

    def sent(self) -> int:
        return self.server.call(lambda: len(self.server.exchange.orders(open_only=False)))


@pytest.fixture
def live_run(
    copied: tuple[RunStore, SessionSpec, RunFolder], exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LiveRun]:
    monkeypatch.chdir(
        Path(copied[1].strategy.partition(":")[0]).parent
    )  # the operator's own project, where the strategy's file lies
    with ExchangeServer(exchange, key_id="key", secret_key="secret") as server:
        yield LiveRun(copied[0], copied[1], server, monkeypatch)


Refused = Callable[..., list[str]]


@pytest.fixture
def refused(live_run: LiveRun, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Resume the run, which has to be refused before anything is sent: the reasons."""

    def call(*more: str, account: str = "SIMULATED", code: int = 3) -> list[str]:
        assert main(["live", "--account", account, *more, "--resume", live_run.run.name]) == code
        said = capsys.readouterr().err.strip().splitlines()
        assert not live_run.sent() and not live_run.run.notebook.exists()
        return said[1:] if len(said) > 1 else said

    return call


def test_a_live_run_that_is_as_it_was_may_go_on(live_run: LiveRun) -> None:
    live_run.write()
    store, settings = RunStore(live_run.run.path.parent), load_settings(env_file=None)
    permit = check_live(
        live_run.asked, settings, account="SIMULATED", given_limits={}, store=store, resume=live_run.run
    )
    assert permit.account == "SIMULATED"


def test_params_of_a_folder_raise_no_limit(live_run: LiveRun, refused: Refused) -> None:
    live_run.write(limits=live_run.limits(max_order_notional=1e9, max_drawdown=None))
    (reason,) = refused()
    assert "A resumed run keeps what it began with: limits.max_order_notional was 60000.0, and 1000000000.0" in reason


def test_a_folder_whose_journal_was_forged_too_has_no_more_than_the_operators_own_limits(
    live_run: LiveRun, refused: Refused
) -> None:
    raised = live_run.limits(max_order_notional=1e9, max_daily_loss=None)
    live_run.write(recorded=raised, limits=raised)
    first, second = refused()
    assert f"The limit max_order_notional of {live_run.run.name} is 1000000000.0, and yours is 60000.0" in first
    assert f"The limit max_daily_loss of {live_run.run.name} is None, and yours is 0.5" in second


def test_limits_in_a_folder_are_not_the_operators(
    live_run: LiveRun, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_run.write()
    for name in OWN:
        monkeypatch.delenv(name)
    reasons = refused()
    assert len(reasons) == 4 and all("has to be yours" in reason for reason in reasons), reasons
    options = [word for name, value in LIMITS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options[1] = "50000"
    (reason,) = refused(*options)
    assert "The limit max_order_notional" in reason and "yours is 50000.0" in reason


def test_a_folder_chooses_neither_profile_nor_account(
    live_run: LiveRun, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_run.write(account="123456789", profile="live")
    (reason,) = refused()
    assert "traded another account than 'SIMULATED'" in reason
    (reason,) = refused(account="123456789")
    assert "The account typed is '123456789'" in reason
    monkeypatch.setenv("TRADER_PROFILE", "paper")
    reasons = refused()
    assert any("The profile is paper: real money needs --profile live." in reason for reason in reasons), reasons


def test_other_parameters_and_another_stage_are_refused(live_run: LiveRun, refused: Refused) -> None:
    live_run.write(stage="paper", seed=9, cash=5.0)
    stage, *changed = refused()
    assert "the stage 'paper'" in stage
    assert [reason.partition(": ")[2] for reason in changed] == [
        "cash was 100000.0, and 5.0 is asked for.",
        "seed was 0, and 9 is asked for.",
    ]


def test_a_resumed_run_keeps_its_parameters(live_run: LiveRun, refused: Refused) -> None:
    live_run.write()
    assert "Leave out seed, symbols" in refused("--symbols", "GME", "--seed", "5", code=2)[0]


def test_a_strategy_that_was_rewritten_since_is_not_resumed(live_run: LiveRun, refused: Refused) -> None:
    live_run.write()
    file = Path(live_run.asked.strategy.partition(":")[0])
    try:
        file.write_text(STRATEGY.replace("0.4", "4.0"))
        reasons = refused()
    finally:
        file.write_text(STRATEGY)
    assert any("keeps what it began with: the source of holds was sha256:" in reason for reason in reasons), reasons


def test_each_kind_of_session_is_resumed_by_its_own_command(
    live_run: LiveRun, copied: tuple[RunStore, SessionSpec, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    name = live_run.run.name
    assert main(["paper", "--resume", name]) == 2
    assert "it died before it did anything" in capsys.readouterr().err
    live_run.write()
    assert main(["paper", "--resume", name]) == 2
    assert f"`trader live --profile live --account NUMBER --resume {name}`" in capsys.readouterr().err
    renamed = live_run.run.path.rename(live_run.run.path.with_name(name.replace("-live-", "-paper-")))
    assert main(["paper", "--profile", "live", "--resume", renamed.name]) == 2  # a folder of another name
    assert "keeps its parameters. Leave out profile" in capsys.readouterr().err
    assert main(["paper", "--resume", renamed.name]) == 2
    assert "trade real money, which `trader live` alone does" in capsys.readouterr().err
    assert not live_run.sent()


def publish(run: RunFolder, payload: SessionStarted | AgentFailed, source: str = "session") -> None:
    """Write one more event into a journal, as a session would: the chain is whole."""

    async def write() -> None:
        with open_journal(run.journal, read_only=False) as journal:
            await InProcessBus(WallClock(), UniqueIds(), journal, "s").publish(
                payload, source=source, correlation_id="c"
            )
            journal.commit()

    asyncio.run(write())
