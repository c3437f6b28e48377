"""Build trader_lib/market/data/sample_daily.parquet from bokeh_sampledata's copy of Quandl WIKI Prices.

Run it where bokeh_sampledata 2026.1 is installed: `python tests/tools/build_sample_data.py`. A test builds the table
again and compares it with the committed file.
"""

import sys
from pathlib import Path

import bokeh_sampledata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SOURCE = Path(bokeh_sampledata.__file__).parent / "_data" / "stocks.csv.gz"
TARGET = Path(__file__).parents[2] / "trader_lib" / "market" / "data" / "sample_daily.parquet"
FACTOR_DECIMALS = 12  # the source's factors differ beyond the 13th decimal from one day to the next for no reason


def build() -> pa.Table:
    """Raw prices and volumes as the source has them, and the factor that turns raw prices into adjusted ones."""
    source = pd.read_csv(SOURCE, dtype={"Ticker": "string"})
    table = pd.DataFrame(
        {
            "symbol": source["Ticker"].astype(str),
            "date": pd.to_datetime(source["Date"]).dt.date,
            **{name: source[name.capitalize()].astype(np.float64) for name in ("open", "high", "low", "close")},
            "volume": source["Volume"].astype(np.int64),
            "factor": (source["Adj Close"] / source["Close"]).round(FACTOR_DECIMALS),
        }
    ).sort_values(["symbol", "date"], kind="stable")
    schema = pa.schema(
        [("symbol", pa.string()), ("date", pa.date32())]
        + [(name, pa.float64()) for name in ("open", "high", "low", "close")]
        + [("volume", pa.int64()), ("factor", pa.float64())]
    )
    return pa.Table.from_pandas(table, schema=schema, preserve_index=False).replace_schema_metadata(None)


if __name__ == "__main__":
    pq.write_table(build(), TARGET, compression="zstd", compression_level=19)
    sys.stdout.write(f"{TARGET}: {TARGET.stat().st_size:,} bytes\n")
