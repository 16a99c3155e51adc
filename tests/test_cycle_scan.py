"""Cycle scan: the definition, the closed form and the kernels."""

import logging
from itertools import pairwise

import pytest
import torch

from hrsam import kernels
from hrsam.kernels import has_triton, resolve_impl
from hrsam.layout import Layout
from hrsam.ops.cycle_scan import cycle_scan
from tests.numerics import assert_within_budget, surrounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "r", "dt_bias", "A_log", "B", "C", "D", "gamma")
PARAMETERS = ("dt_bias", "A_log", "D", "gamma")
TINY = Layout(((5, 6), (3, 3), (1, 1), (2, 7)), (0, 0, 1, 2))
RAGGED = Layout(((1, 1), (1, 7), (4, 4), (1, 17)), (0, 0, 1, 2))  # one token, a part of a chunk, a chunk, one more
FAST = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="needs Triton")),
]
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


def inputs(layout, channels=6, states=4, cycles=3, dtype=torch.float64, seed=0, device="cpu"):
    """Unit variance, slow decay, some steps above softplus's threshold (channel 0), Σγ = 0 (channel 1).  Parameters
    stay float32 when the tokens are 16-bit."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (layout.tokens, channels), "r": (layout.tokens, channels), "dt_bias": (channels,),
        "B": (layout.tokens, states), "C": (layout.tokens, states), "D": (channels,), "gamma": (channels, cycles),
    }  # fmt: skip
    x = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    x["r"] = 0.5 * x["r"]
    x["r"][::5, 0] = 30.0
    x["dt_bias"] = 0.1 * x["dt_bias"] - 4
    x["gamma"][1, -1] = -x["gamma"][1, :-1].sum()
    x["A_log"] = torch.log(torch.arange(1.0, states + 1, dtype=torch.float64)).repeat(channels, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return {n: x[n].to(device, wide if n in PARAMETERS else dtype).requires_grad_() for n in NAMES}


def double(x):
    return {n: t.detach().double().requires_grad_() for n, t in x.items()}


def with_gradients(x, layout, cotangent, **options):
    y = cycle_scan(**x, layout=layout, **options)
    return y, torch.autograd.grad(y, list(x.values()), cotangent.to(y.dtype))


def test_definition_is_the_repeated_sequence():
    layout = Layout(((2, 4),), (0,))
    x = inputs(layout)
    repeated = {n: t.repeat(3, 1) if n in ("u", "r", "B", "C") else t for n, t in x.items()}
    repeated["gamma"] = torch.ones(6, 1, dtype=torch.float64)
    y = cycle_scan(**repeated, layout=Layout(((6, 4),), (0,)), impl="naive").view(3, 8, 6)
    torch.testing.assert_close(cycle_scan(**x, layout=layout, impl="naive"), torch.einsum("rtc,cr->tc", y, x["gamma"]))


def test_one_token_by_hand():
    layout = Layout(((1, 1),), (0,))
    one = torch.ones(1, 1, dtype=torch.float64)
    x = {
        "u": 2 * one,
        "r": 21 * one,
        "dt_bias": 0 * one[0],
        "A_log": -100 * one,
        "B": 3 * one,
        "C": 5 * one,
        "D": 7 * one[0],
    }
    # A is almost 0, so the state grows by 21 · 3 · 2 in each cycle
    expected = 11 * (5 * 126 + 14) + 13 * (5 * 252 + 14)
    for impl in ("naive", "torch"):
        y = cycle_scan(**x, gamma=torch.tensor([[11.0, 13.0]]).double(), layout=layout, impl=impl)
        assert y.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("cycles", [1, 2, 3, 5])
@pytest.mark.parametrize("across", [False, True])
def test_closed_form_equals_definition(cycles, across):
    x = inputs(TINY, cycles=cycles)
    delta = torch.nn.functional.softplus(x["r"] + x["dt_bias"])[: TINY.lengths[0]]
    cycle_decay = torch.exp(-delta.sum(0)[:, None] * x["A_log"].exp())
    assert cycle_decay.mean() > 0.1, "the cycles must reach each other"
    assert x["gamma"].sum(1)[1].abs() < 1e-12
    cotangent = torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want, want_grads = with_gradients(x, TINY, cotangent, across=across, impl="naive")
    got, grads = with_gradients(x, TINY, cotangent, across=across, impl="torch")
    assert want.dtype == torch.float64
    assert 0 < (got - want).abs().max() <= 2e-14 * want.abs().max()
    for name, a, b in zip(NAMES, grads, want_grads):
        assert (a - b).abs().max() <= 1e-13 * max(b.abs().max(), 1), name


def test_only_the_first_cycle_is_a_plain_scan():
    x = inputs(TINY)
    weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(6, 1)
    plain = {**x, "gamma": torch.ones(6, 1, dtype=torch.float64)}
    torch.testing.assert_close(
        cycle_scan(**{**x, "gamma": weights}, layout=TINY, impl="torch"), cycle_scan(**plain, layout=TINY, impl="naive")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_path_within_budget(dtype):
    x = {n: t.detach() for n, t in inputs(TINY, dtype=dtype).items()}
    high = cycle_scan(**double(x), layout=TINY, across=True, impl="naive").detach()
    low = cycle_scan(**x, layout=TINY, across=True, impl="naive")
    got = cycle_scan(**x, layout=TINY, across=True, impl="torch")
    assert got.dtype == dtype
    assert (low.double() - high).abs().max() > 0
    assert_within_budget(got, low, high)


@pytest.mark.parametrize("impl", ["naive", "torch"])
def test_autocast_leaves_the_states_alone(impl):
    x = inputs(TINY, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = cycle_scan(**x, layout=TINY, impl=impl)
    assert torch.equal(got, cycle_scan(**x, layout=TINY, impl=impl))


def check_kernel(layout, dtype, across, yardstick="naive", **sizes):
    x = inputs(layout, dtype=dtype, device=DEVICE, **sizes)
    cotangent = torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    high, high_grads = with_gradients(double(x), layout, cotangent, across=across, impl=yardstick)
    low, low_grads = with_gradients(x, layout, cotangent, across=across, impl=yardstick)
    strided = {n: surrounded(t) for n, t in x.items()}
    got, grads = with_gradients(strided, layout, surrounded(cotangent).detach(), across=across, impl="triton")
    assert got.dtype == dtype
    assert_within_budget(got, low, high.detach())
    terms = (
        (cotangent.double() * high.detach()).norm(dim=0).max()
    )  # gamma's gradient is a sum of such terms of both signs
    for name, a, b, c in zip(NAMES, grads, low_grads, high_grads):
        assert a.dtype == x[name].dtype, name
        scale = terms if name == "gamma" and dtype == torch.float32 else 0.0
        assert_within_budget(a, b, c, factor=3.0, name=f"gradient of {name}", scale=scale)


@needs_triton
@pytest.mark.parametrize(("across", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_kernel_within_budget(across, dtype, nan_in_new_memory):
    check_kernel(RAGGED, dtype, across, states=2)


@needs_triton
@pytest.mark.parametrize("cycles", [1, 2])
def test_kernel_channel_blocks_and_cycles(cycles, nan_in_new_memory):
    check_kernel(Layout(((1, 3),), (0,)), torch.float32, False, channels=33, states=3, cycles=cycles)


@needs_triton
def test_kernel_long_chain(nan_in_new_memory):
    """More chunks than are loaded ahead."""
    layout = Layout(((9, 16), (1, 5)), (0, 1))
    x = {n: t.detach() for n, t in inputs(layout, states=1, dtype=torch.float32, device=DEVICE).items()}
    high, low = (cycle_scan(**t, layout=layout, impl="naive").detach() for t in (double(x), x))
    assert_within_budget(cycle_scan(**x, layout=layout, impl="triton"), low, high)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("across", [False, True])
def test_kernel_on_gpu(across, dtype, nan_in_new_memory):
    check_kernel(RAGGED, dtype, across)
    check_kernel(Layout(((20, 20), (10, 10), (7, 9)), (0, 0, 1)), dtype, across, channels=48, states=32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_gpu_at_full_size(dtype, nan_in_new_memory):
    layout = Layout(((64, 64), (32, 32), (12, 12)), (0, 0, 1))
    check_kernel(layout, dtype, True, yardstick="torch", channels=192, states=32)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("across", [False, True])
def test_packed_images_do_not_meet(impl, across):
    grids = ((1, 17), (2, 3)), ((3, 1), (1, 2))
    first, second = (Layout(g, (0, 0)) for g in grids)
    both = Layout(grids[0] + grids[1], (0, 0, 1, 1))
    x = {n: t.detach() for n, t in inputs(both, states=2, dtype=torch.float32, device=DEVICE).items()}
    tokens = ("u", "r", "B", "C")

    def scan(start, stop, layout, x=x):
        part = {n: t[start:stop] if n in tokens else t for n, t in x.items()}
        return cycle_scan(**part, layout=layout, across=across, impl=impl)

    packed = scan(0, None, both)
    assert torch.equal(packed[: first.tokens], scan(0, first.tokens, first))
    assert torch.equal(packed[first.tokens :], scan(first.tokens, None, second))
    other = {n: torch.cat([t[: first.tokens], t[first.tokens :] + 1]) if n in tokens else t for n, t in x.items()}
    changed = scan(0, None, both, other)
    assert torch.equal(changed[: first.tokens], packed[: first.tokens])
    assert not torch.equal(changed[first.tokens :], packed[first.tokens :])


@needs_triton
def test_kernel_backward_twice_is_identical():
    layout = Layout(((1, 5),), (0,))
    x = inputs(layout, states=2, dtype=torch.float32, device=DEVICE)
    loss = cycle_scan(**x, layout=layout, impl="triton").square().sum()
    runs = [torch.autograd.grad(loss, list(x.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@needs_triton
def test_kernel_is_an_operator_the_compiler_knows():

    layout = Layout(((1, 2),), (0,))
    x = inputs(layout, states=1, dtype=torch.float32, device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hrsam.cycle_scan.default, (*x.values(), layout.starts), test_utils=tests)

    def loss(x):
        return cycle_scan(**x, layout=layout, impl="triton").square().sum()

    want = torch.autograd.grad(loss(x), list(x.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@needs_triton
def test_chunks_begin_at_their_own_sequence():
    from hrsam.kernels.cycle_scan import CHUNK, chunk_length, scan_tables

    for across in (False, True):
        bounds = RAGGED.boundaries(across)
        chunks, first_chunk = scan_tables(bounds, CHUNK, torch.device("cpu"))
        assert chunks.dtype == first_chunk.dtype == torch.int32
        for sequence, (start, end) in enumerate(pairwise(bounds)):
            rows = chunks[first_chunk[sequence] : first_chunk[sequence + 1]].tolist()
            assert rows == [[token, min(token + CHUNK, end), sequence] for token in range(start, end, CHUNK)]
        assert first_chunk[-1] == len(chunks)
    assert [chunk_length(tokens) for tokens in (1, 2047, 4096, 5120, 17408, 1 << 20)] == [16, 24, 47, 59, 198, 11916]


def test_kernel_refuses_float64_and_tensors_it_cannot_read(monkeypatch):
    if has_triton():
        x = inputs(TINY, device=DEVICE)
        with pytest.raises(ValueError, match="float64"):
            cycle_scan(**x, layout=TINY, impl="triton")
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        resolve_impl("triton", torch.empty(1))
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        resolve_impl("triton", torch.empty(1))
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        resolve_impl("fast", torch.empty(1))


def test_auto_says_once_what_it_chose(caplog):
    kernels._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="hrsam"):
        assert [resolve_impl("auto", torch.empty(1)) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == ["impl='auto' uses 'torch' for cpu tensors"]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name):
    x = inputs(TINY)
    x[name] = x[name][1:]
    with pytest.raises(ValueError, match=f"{name}|dt_bias"):
        cycle_scan(**x, layout=TINY)
