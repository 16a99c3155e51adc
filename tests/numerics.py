"""Tolerances that come from the data."""

import torch


def assert_within_budget(got, low, high, factor=2.0, name="result", scale=0.0):
    """``got`` may be ``factor`` times as far from ``high`` (the twin in float64) as ``low`` (the twin in got's dtype)
    is, rounding of the result included.  Largest absolute errors; NaN fails.  ``scale``: size of the numbers whose
    difference the result is, where that is larger than the result."""
    assert high.dtype == torch.float64, f"the yardstick must be float64, got {high.dtype}"
    assert got.shape == low.shape == high.shape, f"shapes differ: {got.shape}, {low.shape}, {high.shape}"
    error = (got.double() - high).abs().max()
    largest = high.abs().max()
    rounding = torch.finfo(got.dtype).eps * max(largest, scale)
    budget = factor * ((low.double() - high).abs().max() + rounding)
    assert error <= budget, f"{name}: error {error:.2e} exceeds budget {budget:.2e}, largest value {largest:.2e}"


def surrounded(t):
    """The same values as a slice of a larger buffer of NaN."""
    buffer = torch.full([n + 3 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    inner = buffer[tuple(slice(1, n + 1) for n in t.shape)]
    return inner.copy_(t.detach()).requires_grad_()
