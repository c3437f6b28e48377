"""Write a small journal of today's formats: `python -m tests.journals FOLDER`.

Formats 1 and 2 here were written by the library as it was on 2026-11-23 and on 2026-11-28 at 09:01 UTC, by
`trader paper --symbols AAPL --start 2012-02-01 --end 2012-03-16 -p fast=2 -p slow=5`; formats 3 and 4 by this.
"""

from __future__ import annotations

import asyncio
import lzma
import sys
from datetime import date
from pathlib import Path

from trader_lib import SessionSpec, SmaCross, load_settings, run_session, synthetic_bars

KEY = "a-key-that-only-the-tests-know-0123456789"
FOLDER = Path(__file__).parent


def kept(version: int, folder: Path) -> Path:
    """Unpack the journal of a format into a folder, and return its path."""
    path = folder / f"format_{version}.sqlite"
    path.write_bytes(lzma.decompress((FOLDER / f"format_{version}.sqlite.xz").read_bytes()))
    return path


def write(folder: Path, *, keyed: bool) -> Path:
    """Play 320 minutes with few orders and return the journal's path; from minute 257 on bars may pass together."""
    journal = {"key": KEY, "ledger_path": str(folder / "ledger.sqlite")} if keyed else {}
    path = folder / "journal.sqlite"
    costs = {"volume_share": 1.0}  # an order fills at once
    spec = {"strategy": "sma_cross", "symbols": ["SYN"], "timeframe": "1Min", "costs": costs}
    settings = {"broker": {"kind": "simulated", "transport": "in_process"}, "journal": journal}
    asyncio.run(
        run_session(
            SessionSpec.model_validate(spec),
            load_settings(overrides=settings, env_file=None),
            bars=synthetic_bars(["SYN"], date(2010, 1, 4), date(2010, 1, 5), "1Min", seed=1).head(320),
            strategy=SmaCross(fast=10, slow=50),
            journal_path=path,
            check=False,
        )
    )
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for version, is_keyed in ((3, False), (4, True)):
        place = target / str(version)
        place.mkdir(parents=True)
        packed = lzma.compress(write(place, keyed=is_keyed).read_bytes(), preset=9)
        (target / f"format_{version}.sqlite.xz").write_bytes(packed)
