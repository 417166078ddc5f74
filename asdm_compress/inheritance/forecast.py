"""Forecasts: what a feature is expected to be at a step, from its values at earlier steps.

Newton's divided differences on the abscissae of these steps; order 0 holds the last value, order 1 draws a straight
line through the last two. With damping λ the difference of order k counts λ^k times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from asdm_compress.core.errors import AsdmError

Abscissa = Literal["index", "log-snr", "sigma"]
MAX_ORDER: Final = 4
_NAME: Final = re.compile(
    r"(?P<order>hold|linear|order(?P<degree>\d))(@(?P<abscissa>[a-z-]+))?(\*(?P<damping>\d+(\.\d+)?))?"
)
FORECAST_GRAMMAR: Final = "hold, linear, linear@log-snr, order2@sigma*0.8"


@dataclass(frozen=True, slots=True)
class Forecast:
    """How a value is forecast: the polynomial's order, what it is a polynomial of, and its damping in (0, 1].

    Raises AsdmError for what makes no forecast.
    """

    order: int = 0
    abscissa: Abscissa = "index"
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MAX_ORDER:
            raise AsdmError(f"a forecast's order is 0 to {MAX_ORDER}, not {self.order}")
        if self.abscissa not in get_args(Abscissa):
            raise AsdmError(f"unknown abscissa {self.abscissa!r}", f"Use {', '.join(get_args(Abscissa))}.")
        if not 0 < self.damping <= 1:
            raise AsdmError(f"the damping of a forecast is above 0 and at most 1, not {self.damping:g}")

    @property
    def name(self) -> str:
        """For example `linear@log-snr*0.8`."""
        name = ("hold", "linear")[self.order] if self.order < 2 else f"order{self.order}"
        if self.order:
            name += f"@{self.abscissa}" if self.abscissa != "index" else ""
            name += f"*{self.damping:g}" if self.damping != 1 else ""
        return name


HOLD: Final = Forecast()
LINEAR: Final = Forecast(1)


def parse_forecast(name: str) -> Forecast:
    """The forecast with a name such as `hold`, `linear@log-snr` or `order2*0.8`; raises AsdmError for others."""
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise AsdmError(f"unknown forecast {name!r}", f"Forecasts are written like {FORECAST_GRAMMAR}.")
    order = {"hold": 0, "linear": 1}.get(match["order"])
    return Forecast(
        int(match["degree"]) if order is None else order,
        match["abscissa"] or "index",  # type: ignore[arg-type]
        float(match["damping"] or 1),
    )


def weights(anchors: Sequence[float], at: float, damping: float = 1.0) -> tuple[float, ...]:
    """The factor of each anchor's value in the forecast at `at`; they add up to one.

    `anchors` are the abscissae of the values, the newest first, all different; as many as the order plus one.
    """
    # Row a holds the divided difference under way of the function that is 1 at anchor a and 0 at the others.
    table = [[float(a == b) for b in range(len(anchors))] for a in range(len(anchors))]
    factors = [row[0] for row in table]
    reach = 1.0
    for order in range(1, len(anchors)):
        reach *= damping * (at - anchors[order - 1])
        for row in table:
            for b in range(len(anchors) - order):
                row[b] = (row[b] - row[b + 1]) / (anchors[b] - anchors[b + order])
        factors = [factor + reach * row[0] for factor, row in zip(factors, table, strict=True)]
    return tuple(factors)


def combine(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The forecast itself; the newest value first. A single value is returned as it is, not copied."""
    newest, result = values[0], values[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        # Factors add up to one, so that differences to the newest value suffice; they keep half precision exact.
        result = torch.lerp(newest, value, factor) if result is newest else result + factor * (value - newest)
    return result
