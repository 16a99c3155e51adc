"""The check that stands before every time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class BenchError(ValueError):
    """A result that is not good enough to say how fast it came."""


class Gate:
    """No speed without a check: largest absolute errors against a budget that comes from the data.

    ``errors``: what was found, for the report.
    """

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []

    def check(self, name: str, got: Tensor, want_high: Tensor, want_low: Tensor, factor: float = 2.0) -> None:
        """``got`` may be ``factor`` times as far from ``want_high`` (more precise) as ``want_low`` (the plain path in got's
        precision) is, rounding of the result included.  Raises :class:`BenchError`, for NaN too."""
        found = self._measure(name, got, want_high, want_low, factor)
        self.errors.append(found)
        _judge(found)

    def check_all(
        self,
        name: str,
        got: Mapping[str, Tensor],
        want_high: Mapping[str, Tensor],
        want_low: Mapping[str, Tensor],
        factor: float = 2.0,
    ) -> None:
        """:meth:`check` of each entry by itself; the one nearest to its budget, or over it, goes into the report.

        A plain error that is small by chance, as those of short tensors can be, counts as the median of all relative to
        their largest values.
        """
        plain = [_error(want_low[k], want_high[k]) / max(_scale(want_high[k]), 1e-300) for k in got]
        usual = statistics.median(plain)
        found = [self._measure(f"{name}: {k}", got[k], want_high[k], want_low[k], factor, usual) for k in got]
        worst = max(found, key=lambda entry: math.inf if math.isnan(entry["of_budget"]) else entry["of_budget"])
        self.errors.append(worst)
        _judge(worst)

    @staticmethod
    def _measure(
        name: str, got: Tensor, high: Tensor, low: Tensor, factor: float, usual: float = 0.0
    ) -> dict[str, Any]:
        if not got.shape == high.shape == low.shape:
            raise BenchError(f"{name}: shapes differ, {tuple(got.shape)}, {tuple(high.shape)} and {tuple(low.shape)}")
        scale = _scale(high)
        error, plain = _error(got, high), _error(low, high)
        budget = factor * (_larger(plain, usual * scale) + torch.finfo(got.dtype).eps * scale)
        share = error / budget if budget else math.inf if error else 0.0
        found = {"error": error, "plain_error": plain, "budget": budget, "of_budget": share, "largest_value": scale}
        return {"name": name, **{key: float(f"{value:.4g}") for key, value in found.items()}}


def _scale(exact: Tensor) -> float:
    return float(exact.abs().max())


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).abs().max())


def _larger(a: float, b: float) -> float:
    """NaN stays NaN."""
    return a if math.isnan(a) else max(a, b)


def _judge(found: dict[str, Any]) -> None:
    if not found["of_budget"] <= 1:
        raise BenchError(
            f"{found['name']} is wrong: its error is {found['error']:.2e} and the plain path's {found['plain_error']:.2e}, "
            f"so at most {found['budget']:.2e} was expected; no speed is shown for a wrong result"
        )
