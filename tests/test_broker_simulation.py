"""The reins over HTTP when the connection breaks."""

import pytest

from trader_lib.broker.simulation import HttpSimulation
from trader_lib.errors.taxonomy import OutcomeUnknown, Retryable
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer


async def test_a_question_is_asked_again_and_a_step_is_not(exchange: Exchange) -> None:
    keys = {"key_id": "key", "secret_key": "secret"}
    with ExchangeServer(exchange, **keys) as first:
        control = HttpSimulation(first.url, "key", "secret")
        before = await control.state()
        port = first.port
    with ExchangeServer(exchange, port=port, **keys):
        assert await control.state() == before  # over a new connection
        await control.advance()
    with ExchangeServer(exchange, port=port, **keys):
        with pytest.raises(OutcomeUnknown, match="Ask for its state"):
            await control.advance()
        assert (await control.state()).index == before.index + 1
    with pytest.raises(Retryable):
        await control.state()
    await control.stop()
