"""The README's own strategy, as a file: trader backtest --strategy examples/dips.py:BuyTheDip --symbols AAPL,MSFT."""

import numpy as np

from trader_lib import Bars, Strategy


class BuyTheDip(Strategy):
    """Hold what closed below its average by more than a threshold, in equal parts."""

    window: int = 20
    dip: float = 0.05

    @property
    def warmup(self) -> int:
        """The first average needs a whole window."""
        return self.window

    def targets(self, bars: Bars) -> np.ndarray:
        """Equal parts of equity for the symbols that have dipped."""
        close = bars.frame("close")
        dipped = close < (1 - self.dip) * close.rolling(self.window).mean()
        return dipped.to_numpy(float) / len(bars.symbols)
