"""A run folder from somebody else names code: nothing of it runs before the user has trusted it by its content."""

import ast
import asyncio
import hashlib
import importlib.util
import json
import os
import py_compile
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import orjson
import pytest

import trader_lib
from trader_lib.app.jobs import Job
from trader_lib.app.schedule import trusted_code
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Misused
from trader_lib.journal.journal import SqliteJournal
from trader_lib.replay.replay import replay
from trader_lib.session.agent_process import agent_command
from trader_lib.session.recorded import recorded_spec, recorded_strategy
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.registry import load_strategy
from trader_lib.strategy.trust import Trust, environment_of, guarded, project_root, why_foreign
from trader_lib.trading.events import SessionStarted

RUN = "20260105T210000Z-paper-abcdef"
Trader = Callable[..., tuple[int, str, str]]
SPEC = SessionSpec(symbols=("IBM",), start=date(2005, 1, 3), end=date(2005, 2, 28))

STRATEGY = """
from trader_lib.strategy.contract import Strategy

class Evil(Strategy):
    share: float = 0.5

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars):
        return bars.frame("close").notna() * self.share / len(bars.symbols)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a session of a strategy like the one above."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "evil.py").write_text(STRATEGY)
    spec = SPEC.model_copy(update={"strategy": f"{folder / 'evil.py'}:Evil", "params": {}})
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    asyncio.run(run_session(spec, settings, journal_path=folder / "journal.sqlite"))
    return folder / "journal.sqlite"


class Received:
    """A project of the user's with a run folder that somebody sent, and code that leaves a mark when it runs."""

    def __init__(self, project: Path, recorded: Path) -> None:
        self.project, self.recorded = project, recorded
        self.mark = project / "it_ran"
        self.run = project / "received" / RUN
        self.code = f"open({str(self.mark)!r}, 'a').write('x')\n{STRATEGY}"
        self.run.mkdir(parents=True)
        self.evil = self.write(self.run / "evil.py")

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.code)
        return path

    def name(self, reference: str, *, several: bool = False, sources: dict[str, str] | None = None) -> None:
        """Let the journal, the parameters and a file of strategies name that."""
        strategies = [{"name": "trend", "strategy": reference, "capital": "60%"}] if several else []
        given = {**SPEC.values(), "params": {}, "strategy": reference}
        if several:
            given |= {"strategy": "", "strategies": strategies}
        self.journal.unlink(missing_ok=True)
        with SqliteJournal(self.recorded, read_only=True) as source, SqliteJournal(self.journal) as journal:
            for event in source.read():
                if isinstance(event.payload, SessionStarted):
                    update = {"parameters": {**event.payload.parameters, **given}, "sources": sources or {}}
                    event = event.model_copy(update={"payload": event.payload.model_copy(update=update)})
                journal.append(event)
        asked = {**given, "broker": "simulated", "transport": "in_process"}
        (self.run / "params.json").write_bytes(orjson.dumps({"kind": "paper", "parameters": asked}))
        self.parameters.write_bytes(orjson.dumps(asked))
        self.strategies.write_text(f'[trend]\nstrategy = {json.dumps(reference)}\ncapital = "60%"\n')

    journal = property(lambda self: self.run / "journal.sqlite")
    parameters = property(lambda self: self.run / "asked.json")
    strategies = property(lambda self: self.run / "strategies.toml")


@pytest.fixture
def received(trader: Trader, recorded: Path, tmp_path: Path) -> Received:
    (tmp_path / "project" / "strategies").mkdir(parents=True)
    os.chdir(tmp_path / "project")  # `trader` goes back
    return Received(tmp_path / "project", recorded)


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    before = set(sys.modules)
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    for name in set(sys.modules) - before:
        if name.startswith("evil"):
            del sys.modules[name]


def digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def commands(received: Received) -> dict[str, list[str]]:
    run = str(received.run)
    return {
        "replay": ["replay", run],
        "replay the journal": ["replay", str(received.journal)],
        "replay another version": ["replay", run, "-p", "share=0.1"],
        "run": ["run", "paper", "--parameters", str(received.parameters)],
        "strategies": ["paper", "--transport", "in_process", "--strategies", str(received.strategies)],
    }


def refused_everywhere(trader: Trader, received: Received, file: Path) -> None:
    for what, command in commands(received).items():
        code, out, err = trader(*command)
        assert (code, out) == (2, ""), (what, code, out, err)
        assert str(file.resolve()) in err and f"--trust {digest(file)}" in err and "Nothing of it was run" in err, what
    sessions = received.run.joinpath("journal.sqlite")
    kept = sessions.read_bytes()
    sessions.unlink()  # a run that never wrote one can be resumed
    code, out, err = trader("paper", "--resume", str(received.run))
    assert (code, out) == (2, "") and str(file.resolve()) in err and f"--trust {digest(file)}" in err, err
    sessions.write_bytes(kept)
    assert not received.mark.exists(), "it ran"


@pytest.mark.parametrize(
    "reference",
    [
        "{run}/evil.py:Evil",
        "received/{name}/evil.py:Evil",
        "strategies/../received/{name}/evil.py:Evil",
        "{run}/evil.py",
    ],
)
def test_code_in_a_received_run_folder_does_not_run(trader: Trader, received: Received, reference: str) -> None:
    received.name(reference.format(run=received.run, name=RUN))
    refused_everywhere(trader, received, received.evil)


def test_code_of_one_of_several_strategies_does_not_run(trader: Trader, received: Received) -> None:
    received.name(f"{received.evil}:Evil", several=True)
    refused_everywhere(trader, received, received.evil)


def test_code_beside_a_received_run_folder_does_not_run(trader: Trader, received: Received) -> None:
    received.name("received/beside.py:Evil")
    received.write(received.project / "received" / "beside.py")
    code, _, err = trader("replay", str(received.run))
    assert code == 2 and "with what names it" in err and not received.mark.exists()


def test_code_outside_the_project_does_not_run(trader: Trader, received: Received) -> None:
    outside = received.write(received.project.parent / "outside.py")
    (received.project / "pyproject.toml").touch()
    received.name(f"{outside}:Evil")
    refused_everywhere(trader, received, outside)


def test_a_link_out_of_the_project_is_followed_before_it_is_judged(trader: Trader, received: Received) -> None:
    link = received.project / "strategies" / "mine.py"
    link.symlink_to(received.evil)
    received.name(f"{link}:Evil")
    refused_everywhere(trader, received, received.evil)


def test_the_exported_cells_of_a_received_notebook_do_not_run(trader: Trader, received: Received) -> None:
    cells = [{"cell_type": "code", "source": "#| export\n" + received.code, "metadata": {}, "outputs": []}]
    notebook = received.run / "evil.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    received.name(f"{notebook}:Evil")
    refused_everywhere(trader, received, notebook)


@pytest.mark.parametrize("module", ["evil_module", "evil_package", "evil_package.inner.strategy"])
def test_a_module_that_a_journal_names_is_found_and_not_imported(
    trader: Trader, received: Received, on_path: Callable[[Path], None], module: str
) -> None:
    on_path(received.run)
    received.write(received.run / "evil_module.py")
    for part in ("__init__.py", "inner/__init__.py", "inner/strategy.py"):
        received.write(received.run / "evil_package" / part)
    found = received.run.joinpath(*module.split("."))
    file = found.with_suffix(".py") if found.with_suffix(".py").exists() else found / "__init__.py"
    received.name(f"{module}:Evil")
    refused_everywhere(trader, received, file)
    assert module not in sys.modules


def test_a_package_is_not_imported_for_a_module_of_the_users_own_inside_it(
    trader: Trader, received: Received, on_path: Callable[[Path], None]
) -> None:
    own = received.project / "strategies" / "own.py"
    own.write_text(STRATEGY)
    on_path(received.run)
    received.write(received.run / "evil_package" / "__init__.py")
    (received.run / "evil_package" / "own.py").symlink_to(own)
    received.name("evil_package.own:Evil")
    assert trader("replay", str(received.run))[0] == 0  # its own file ran, as a file
    assert not received.mark.exists() and "evil_package" not in sys.modules


def test_a_module_of_python_itself_is_not_imported_because_a_journal_says_so(
    trader: Trader, received: Received
) -> None:
    received.name("antigravity:Evil")
    sys.modules.pop("antigravity", None)
    code, _, err = trader("replay", str(received.run))
    assert code == 2 and "antigravity.py" in err and "antigravity" not in sys.modules
    received.name("no_such_module_anywhere:Evil")
    code, _, err = trader("replay", str(received.run))
    assert code == 2 and "cannot be imported" in err


def test_standing_in_the_received_folder_makes_nothing_in_it_ones_own(trader: Trader, received: Received) -> None:
    received.name("evil.py:Evil")
    (received.run / ".env").touch()
    os.chdir(received.run)
    code, _, err = trader("replay", str(received.journal))
    assert code == 2 and str(received.evil) in err and not received.mark.exists()


# ---- what trust does


def test_trust_is_bound_to_content_and_says_what_runs(trader: Trader, received: Received) -> None:
    received.name(f"{received.evil}:Evil")
    right = digest(received.evil)
    code, _, err = trader("replay", str(received.run), "--trust", "sha256:" + 64 * "0")
    assert code == 2 and right in err and not received.mark.exists()
    code, _, err = trader("replay", str(received.run), "--trust", "anything")
    assert code == 2 and "is no hash" in err and not received.mark.exists()

    for trust in (["--trust", right], ["--trust"]):
        code, out, err = trader("replay", str(received.run), *trust)
        assert code == 0 and "The replay agrees" in out, err
        assert f"Trusted: {received.evil}:Evil runs {received.evil}, {right}." in err
        assert received.mark.exists()
        received.mark.unlink()

    received.evil.write_text(received.code + "# one more line\n")
    assert trader("replay", str(received.run), "--trust", right)[0] == 2 and not received.mark.exists()


def test_what_was_read_is_what_is_hashed_and_what_runs(received: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    innocent = received.evil
    innocent.write_text(STRATEGY)
    trust, ensure = Trust(frozenset({digest(innocent)})), Trust.ensure

    def exchange_the_file(self: Trust, *about: object) -> bool:
        passed = ensure(self, *about)  # type: ignore[arg-type]
        innocent.write_text(received.code)
        return passed

    monkeypatch.setattr(Trust, "ensure", exchange_the_file)
    with guarded(trust):
        assert load_strategy(f"{innocent}:Evil").name == "evil"
    assert not received.mark.exists() and digest(innocent) not in trust.digests


def test_a_file_that_changes_after_it_was_trusted_does_not_run_again(trader: Trader, received: Received) -> None:
    received.code += f"\nwith open({str(received.evil)!r}, 'a') as file:\n    file.write('# changed')\n"
    received.write(received.evil)
    received.name(f"{received.evil}:Evil")
    received.journal.unlink()
    shown = digest(received.evil)
    code, _, err = trader("paper", "--resume", str(received.run), "--trust")
    assert code == 2 and shown in err and digest(received.evil) in err
    assert received.mark.read_text() == "x"  # once: the content that was shown


@pytest.mark.slow
def test_a_resumed_session_runs_what_was_trusted_in_its_kernel(trader: Trader, received: Received) -> None:
    shadows = received.run / "it_shadowed"
    for name in ("ipykernel_launcher", "queue", "pandas", "trader_lib"):
        (received.run / f"{name}.py").write_text(f"open({str(shadows)!r}, 'a').write('{name} ')\n")
    received.name(f"{received.evil}:Evil")
    received.journal.unlink()
    os.chdir(received.run)  # where a kernel would look first for what it imports
    code, _, err = trader("paper", "--resume", str(received.run), "--trust", digest(received.evil))
    assert code == 0 and "Trusted:" in err
    assert not shadows.exists(), shadows.read_text()
    assert orjson.loads((received.run / "result.json").read_bytes())["status"] == "completed"


def test_another_process_guards_itself_in_the_same_way(received: Received) -> None:
    received.name("sma_cross")
    code = f"from trader_lib.strategy.registry import load_strategy; load_strategy('{received.evil}:Evil')"
    for trust, works in ((Trust(), False), (Trust(frozenset({digest(received.evil)})), True)):
        environ = {**os.environ, **environment_of(trust)}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is works, done.stderr
        assert received.mark.exists() is works


def test_bytecode_beside_a_trusted_module_does_not_run(
    received: Received, on_path: Callable[[Path], None], tmp_path: Path
) -> None:
    received.name("sma_cross")
    source, wicked = received.run / "evil_module.py", tmp_path / "wicked.py"
    wicked.write_text(received.code)
    source.write_text(STRATEGY + "#" * (len(received.code) - len(STRATEGY) - 1) + "\n")
    os.utime(wicked, (1_700_000_000, 1_700_000_000))
    os.utime(source, (1_700_000_000, 1_700_000_000))
    py_compile.compile(str(wicked), importlib.util.cache_from_source(str(source)))
    on_path(received.run)
    with guarded(Trust(frozenset({digest(source)}))):
        assert load_strategy("evil_module:Evil").name == "evil"
    assert not received.mark.exists()
    load_strategy("evil_module:Evil")  # named by the user, it is imported, and the bytecode runs: the attack is real
    assert received.mark.exists()


# ---- what is the user's own


async def test_a_strategy_of_the_project_runs_and_a_file_that_differs_is_named(
    trader: Trader, received: Received
) -> None:
    own, reference = received.project / "strategies" / "own.py", "strategies/own.py:Evil"
    own.write_text(STRATEGY)
    run = received.project / "runs" / RUN
    run.mkdir(parents=True)
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    spec = SPEC.model_copy(update={"strategy": reference})
    await run_session(spec, settings, journal_path=run / "journal.sqlite")
    write_result(run)
    compared = ("runs", "compare", RUN, RUN)
    for command in (("replay", RUN), compared):
        code, out, err = await asyncio.to_thread(trader, *command)
        assert code == (0 if command[0] == "replay" else 1) and "the code that ran" not in out, err

    own.write_text(STRATEGY.replace("0.5", "0.25"))
    named = f"{reference} is not the code that ran: its source is sha256:"
    code, out, err = await asyncio.to_thread(trader, "replay", RUN)
    assert code == 0 and named in out, err  # the journal holds every parameter
    assert named in (await asyncio.to_thread(trader, *compared))[1]
    assert named in orjson.loads((await asyncio.to_thread(trader, *compared, "--json"))[1])["code"][0]

    (run / "result.json").unlink()
    asked = {**spec.values(), "params": {}, "source": "alpaca", "broker": "simulated", "transport": "in_process"}
    (run / "params.json").write_bytes(orjson.dumps({"kind": "paper", "parameters": asked}))
    code, _, err = await asyncio.to_thread(trader, "paper", "--resume", RUN)
    assert code == 3 and named in err and "need keys" in err  # and goes no further here


def write_result(run: Path) -> None:
    moment = "2026-01-05T21:00:00Z"
    result = {"kind": "paper", "status": "completed", "parameters": {}, "started_at": moment, "ended_at": moment}
    (run / "result.json").write_bytes(orjson.dumps(result | {"versions": {}}))


def test_comparing_runs_loads_no_foreign_code(trader: Trader, received: Received) -> None:
    received.name(f"{received.evil}:Evil", sources={"evil": "sha256:" + 64 * "0"})
    write_result(received.run)
    code, out, err = trader("runs", "compare", str(received.run), str(received.run))
    assert code == 1 and not received.mark.exists(), err
    assert "Whether evil is still the code that ran is not known" in out and digest(received.evil) in out


def test_what_the_user_types_runs_without_trust(trader: Trader, received: Received) -> None:
    received.name(f"{received.evil}:Evil")
    code, _, _ = trader("replay", str(received.run), "--strategy", f"{received.evil}:Evil")
    assert code == 0 and received.mark.exists()
    code, _, err = trader("paper", "--strategy", f"{received.evil}:Evil", "--trust")
    assert code == 2 and "What you name yourself runs without it" in err


def test_others_who_may_write_to_a_file_make_it_foreign(received: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    own = received.write(received.project / "strategies" / "own.py")
    assert why_foreign(own) == ""
    own.parent.chmod(0o777)
    assert "everybody may write" in why_foreign(own)
    own.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    os.chown(own, 54_321, -1) if os.geteuid() == 0 else None
    assert "belongs to another user" in why_foreign(own)


def test_a_home_folder_is_no_project_because_it_holds_dotfiles(
    received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = received.project
    monkeypatch.setenv("HOME", str(home))
    (home / ".git").mkdir()
    assert project_root(home) is None and project_root(home.parent) is None
    assert project_root(home / "strategies") == home / "strategies"
    (home / "pyproject.toml").touch()
    assert project_root(home / "strategies") == home


# ---- notebooks, the schedule, agents, Python


def test_a_notebook_out_of_a_run_folder_runs_only_on_trust(trader: Trader, received: Received) -> None:
    received.name("sma_cross")
    code = {"cell_type": "code", "source": f"open({str(received.mark)!r}, 'w')", "metadata": {}, "outputs": []}
    cells = [code | {"id": "a", "execution_count": None}]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = received.run / "notebook.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    code_, _, err = trader("run", str(notebook))
    assert code_ == 2 and f"--trust {digest(notebook)}" in err and not received.mark.exists()
    code_, _, err = trader("run", str(notebook), "--trust", digest(notebook))
    assert code_ == 0 and "Trusted:" in err and received.mark.exists()


def test_python_functions_refuse_as_the_commands_do(received: Received) -> None:
    received.name(f"{received.evil}:Evil")
    with SqliteJournal(received.journal, read_only=True) as journal:
        started = next(iter(journal.read(types=[SessionStarted]))).payload
    assert isinstance(started, SessionStarted)
    with pytest.raises(Misused, match="Nothing of it was run"):
        recorded_strategy(started, recorded_spec(started), Trust())
    assert not received.mark.exists()


async def test_replay_in_python_takes_trust_as_an_argument(received: Received) -> None:
    received.name(f"{received.evil}:Evil")
    with SqliteJournal(received.journal, read_only=True) as journal:
        with pytest.raises(Misused, match="--trust sha256:"):
            await replay(journal)
        assert not received.mark.exists()
        assert (await replay(journal, trust=Trust(frozenset({digest(received.evil)})))).agrees


def test_a_job_trusts_what_its_file_names_and_an_agent_is_given_the_trust(received: Received) -> None:
    several = [{"name": "trend", "strategy": f"{received.evil}:Evil", "capital": "60%"}]
    for parameters in ({"strategy": f"{received.evil}:Evil"}, {"strategies": several}):
        job = Job(name="day", notebook="paper", at="open", parameters=parameters)
        assert trusted_code(job) == [f"--trust={digest(received.evil)}"]
    assert trusted_code(Job(name="day", notebook="paper", at="open", parameters={"strategy": "sma_cross"})) == []
    assert not received.mark.exists()
    assert agent_command("risk", trust=True)[-1] == "--trust"
    assert agent_command("risk", trust="sha256:ab")[-1] == "--trust=sha256:ab"


def test_nothing_in_the_library_unpickles() -> None:
    """But for the processes of checks and sweeps, which are handed their strategy by the process that started them."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    package = Path(trader_lib.__file__).parent
    research = package / "research"
    may = {package / "strategy" / "fresh.py", research / "sweep.py", research / "cluster.py"}
    for path in set(package.rglob("*.py")) - may:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.partition(".")[0] for name in names}, path
            assert not (isinstance(node, ast.Attribute) and node.attr in {"read_pickle", "allow_pickle"}), path


def test_the_process_that_checks_a_strategy_reads_no_pickle_but_its_request() -> None:
    tree = ast.parse((Path(trader_lib.__file__).parent / "strategy" / "fresh.py").read_text(encoding="utf-8"))
    loading = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"pickle.loads", "pickle.load", "cloudpickle.loads"}
    }
    assert loading == {"answer", "unpack"}  # both in the child, which reads its standard input once
    assert not any(isinstance(node, ast.Attribute) and node.attr == "Unpickler" for node in ast.walk(tree))
