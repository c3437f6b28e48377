"""A short session with monitoring beside it, and what it showed."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import requests
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from trader_lib.config.settings import Settings, load_settings
from trader_lib.observe.address import monitor_url
from trader_lib.observe.companions import companions
from trader_lib.session.companions import Companion, SessionParts
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec

SPEC = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=date(2005, 3, 31))


def observed_settings(transport: str = "in_process", **sections: dict[str, Any]) -> Settings:
    """Settings that show a session on a free port."""
    given = {"broker": {"transport": transport}, "monitoring": {"port": 0}} | sections
    return load_settings(environ={}, env_file=None, overrides=given)


@dataclass
class Visitor:
    """Looks at every address when the session has traded and its agents are still there."""

    paths: tuple[str, ...] = ("healthz", "readyz", "metrics")
    answers: dict[str, requests.Response] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)

    @asynccontextmanager
    async def __call__(self, parts: SessionParts) -> AsyncIterator[None]:
        yield
        url = monitor_url(parts.run_folder)
        self.note = json.loads((parts.run_folder / "monitor.json").read_bytes())
        for path in self.paths:
            self.answers[path] = await asyncio.to_thread(requests.get, f"{url}/{path}", timeout=5)


async def observed_session(
    folder: Path, settings: Settings, *, beside: Iterable[Companion] = (), spec: SessionSpec = SPEC, **more: Any
) -> tuple[SessionResult, Visitor]:
    """A session to its end with what the settings ask for beside it, and what its visitor saw."""
    os.makedirs(folder, exist_ok=True)
    visitor = Visitor()
    result = await run_session(
        spec,
        settings,
        journal_path=folder / "journal.sqlite",
        companions=[*companions(settings), *beside, visitor],
        **more,
    )
    return result, visitor


def families(text: str) -> dict[str, Metric]:
    """The metric families of a scrape, by the name that the table has."""
    found = text_string_to_metric_families(text)
    return {f"{one.name}_total" if one.type == "counter" else one.name: one for one in found}
