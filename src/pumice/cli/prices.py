"""What an endpoint's tokens cost, from a command's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.core.llm_types import Prices


def read_prices(price_in: float | None, price_out: float | None, flag: str) -> Prices | None:
    """Both prices or neither; `flag` is what the options' names begin with."""
    from pumice.core.llm_types import Prices

    if price_in is None and price_out is None:
        return None
    if price_in is None or price_out is None:
        raise PumiceError(f"give both {flag}-in and {flag}-out, or neither.")
    return Prices(price_in, price_out)
