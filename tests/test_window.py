"""Window attention: naive twin against the fast path, layout tables, rotary positions."""

import math

import pytest
import torch

from hrsam.layout import Layout
from hrsam.ops.rope import Rope, angles, position_table, rotate
from hrsam.ops.window import window_attention, window_padding, window_plan
from tests.numerics import assert_within_budget

ROPE = Rope()


def inputs(layout, heads=2, key_heads=None, dim=8, value_dim=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    key_heads, value_dim = key_heads or heads, value_dim or dim

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    q, k = draw(layout.tokens, heads, dim), draw(layout.tokens, key_heads, dim)
    v = draw(layout.tokens, key_heads, value_dim)
    return q, k, v, (draw(key_heads, dim), draw(key_heads, value_dim))


LAYOUTS = {
    "1x1": Layout(((1, 1),), (0,)),
    "smaller than a window": Layout(((2, 3),), (0,)),
    "13x9": Layout(((13, 9),), (0,)),
    "two images, two scales": Layout(((5, 6), (3, 3), (4, 8), (3, 3)), (0, 0, 1, 1)),
}


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_fast_path_equals_definition(layout, shift, pad):
    q, k, v, pad_kv = inputs(layout, heads=4, key_heads=2, value_dim=12)
    options = {"rope": ROPE, "window": 4, "shift": shift, "pad_kv": pad_kv if pad else None}
    want = window_attention(q, k, v, layout, impl="naive", **options)
    got = window_attention(q, k, v, layout, impl="torch", **options)
    assert want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    leaves = [q, k, v, *(pad_kv if pad else ())]
    for a, b in zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget(dtype):
    layout = Layout(((9, 11), (5, 5)), (0, 0))
    q, k, v, pad_kv = (t if isinstance(t, tuple) else t.detach() for t in inputs(layout, dim=16, dtype=dtype))
    pad_kv = tuple(t.detach() for t in pad_kv)
    wide = [t.double() for t in (q, k, v)]
    options = {"rope": ROPE, "window": 4, "shift": 2}
    high = window_attention(*wide, layout, impl="naive", pad_kv=tuple(t.double() for t in pad_kv), **options)
    low = window_attention(q, k, v, layout, impl="naive", pad_kv=pad_kv, **options)
    got = window_attention(q, k, v, layout, impl="torch", pad_kv=pad_kv, **options)
    assert (low.double() - high).abs().max() > 0
    assert_within_budget(got, low, high)


def test_large_logits_stay_finite():
    layout = LAYOUTS["13x9"]
    q, k, v, pad_kv = inputs(layout)
    options = {"rope": ROPE, "window": 4, "shift": 2, "pad_kv": pad_kv}
    want = window_attention(q * 60, k, v, layout, impl="naive", **options)
    torch.testing.assert_close(window_attention(q * 60, k, v, layout, impl="torch", **options), want)
    assert want.isfinite().all()


def test_packed_images_do_not_touch_each_other():
    one, two = Layout(((13, 9), (3, 3)), (0, 0)), Layout(((13, 9), (3, 3), (6, 6), (3, 3)), (0, 0, 1, 1))
    q, k, v, pad_kv = inputs(two, dtype=torch.float32)
    options = {"rope": ROPE, "window": 4, "shift": 2, "pad_kv": pad_kv}
    n = one.tokens
    alone = window_attention(q[:n], k[:n], v[:n], one, **options)
    assert torch.equal(window_attention(q, k, v, two, **options)[:n], alone)
    other = torch.cat((v[:n], torch.full_like(v[n:], math.nan)))
    assert torch.equal(window_attention(q, k, other, two, **options)[:n], alone)


def test_strided_inputs():
    layout = LAYOUTS["13x9"]
    qkv = torch.randn(layout.tokens, 3, 2, 8, dtype=torch.float64)
    _, _, _, pad_kv = inputs(layout)
    options = {"rope": ROPE, "window": 4, "shift": 2, "pad_kv": pad_kv}
    got = window_attention(*qkv.unbind(1), layout, **options)
    want = window_attention(*(t.contiguous() for t in qkv.unbind(1)), layout, **options)
    assert torch.equal(got, want)


def test_backward_twice():
    layout = LAYOUTS["13x9"]
    q, k, v, pad_kv = inputs(layout)
    out = window_attention(q, k, v, layout, rope=ROPE, window=4, shift=2, pad_kv=pad_kv).sum()
    first = torch.autograd.grad(out, [q, v], retain_graph=True)
    second = torch.autograd.grad(out, [q, v])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("grid", "shift", "padding", "windows", "share"),
    [
        ((64, 64), 0, (0, 0, 0, 0), 16, 0.0),
        ((64, 64), 8, (8, 8, 8, 8), 25, 0.36),
        ((128, 128), 8, (8, 8, 8, 8), 81, 0.21),
        ((32, 32), 8, (8, 8, 8, 8), 9, 0.556),
        ((37, 50), 0, (0, 0, 11, 14), 12, None),
        ((10, 23), 8, (8, 8, 14, 1), 4, None),
    ],
)
def test_window_layout(grid, shift, padding, windows, share):
    """hrsam's published layout: padding at the top and left of shifted windows, no roll."""
    assert window_padding(*grid, 16, shift) == padding
    plan = window_plan(Layout((grid,), (0,)), 16, shift, torch.device("cpu"))
    assert plan.is_token.numel() == windows * 256
    if share is not None:
        assert 1 - plan.is_token.float().mean() == pytest.approx(share, abs=1e-3)
    tokens = grid[0] * grid[1]
    assert torch.equal(plan.token_of_slot[plan.slot_of_token], torch.arange(tokens))
    assert torch.equal(plan.token_of_slot[plan.is_token].sort().values, torch.arange(tokens))


def test_rotation_sign_and_halves():
    phi = torch.tensor([0.3])
    x = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(rotate(x, phi.cos(), phi.sin()), torch.tensor([math.cos(0.3), -math.sin(0.3)]))
    table = angles(ROPE, torch.tensor([[5, 0], [0, 5]]), 64)
    assert table[0, 16:].abs().max() == 0
    assert table[1, :16].abs().max() == 0
    frequencies = 10000 ** (-2 * torch.arange(16, dtype=torch.float64) / 32)
    torch.testing.assert_close(table[0, :16], 0.5 * 5 * frequencies)


def test_products_depend_on_position_differences():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 64, generator=g, dtype=torch.float64)

    def product(at_q, at_k):
        a, b = angles(ROPE, torch.tensor(at_q), 64), angles(ROPE, torch.tensor(at_k), 64)
        return rotate(q, a.cos(), a.sin()) @ rotate(k, b.cos(), b.sin())

    assert product([3, 7], [5, 1]) == pytest.approx(float(product([103, 57], [105, 51])), rel=1e-12)
    cos, _ = position_table(ROPE, 16, 16, 64, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(cos[17], angles(ROPE, torch.tensor([1, 1]), 64).cos())


def test_user_errors():
    layout = LAYOUTS["1x1"]
    q, k, v, _ = inputs(layout)
    with pytest.raises(ValueError, match="layout has 1 tokens"):
        window_attention(torch.cat((q, q)), k, v, layout)
    with pytest.raises(ValueError, match="shift must be in"):
        window_attention(q, k, v, layout, window=4, shift=4)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        window_attention(q, k, v, layout, impl="fast")
    with pytest.raises(ValueError, match="key heads must divide"):
        window_attention(q, k[..., :4], v, layout)
