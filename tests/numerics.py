"""Tolerances that come from the data."""

import torch


def assert_within_budget(got, low, high, factor=2.0):
    """``got`` may be ``factor`` times as far from ``high`` (the twin in float64) as ``low`` (the twin in got's dtype)
    is, rounding of the result included.  Largest absolute errors; NaN fails."""
    assert high.dtype == torch.float64, f"the yardstick must be float64, got {high.dtype}"
    assert got.shape == low.shape == high.shape, f"shapes differ: {got.shape}, {low.shape}, {high.shape}"
    error = (got.double() - high).abs().max()
    rounding = torch.finfo(got.dtype).eps * high.abs().max()
    budget = factor * ((low.double() - high).abs().max() + rounding)
    assert error <= budget, f"error {error:.2e} exceeds budget {budget:.2e}"
