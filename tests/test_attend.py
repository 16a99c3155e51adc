"""Attention over a plan: the definition, the kernel, and the mixers built on it."""

import math

import pytest
import torch

from hrsam.kernels import has_triton
from hrsam.layout import Layout
from hrsam.ops import MIXERS
from hrsam.ops.attend import NOBODY, PADDING, attend, lists_of, make_plan
from hrsam.ops.full import full_plan
from hrsam.ops.rope import Rope
from hrsam.ops.window import tile_plan
from tests.numerics import assert_within_budget, surrounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")
LAYOUTS = {
    "1x1": Layout(((1, 1),), (0,)),
    "smaller than a window": Layout(((2, 3),), (0,)),
    "13x9": Layout(((13, 9),), (0,)),
    "two images, two scales": Layout(((5, 6), (3, 3), (4, 9), (3, 3)), (0, 0, 1, 1)),
}
OPTIONS = {
    "window": ({"window": 4, "shift": 0}, {"window": 4, "shift": 2}, {"window": 16, "shift": 8}),
    "full": ({},),
}
CASES = [(name, options) for name in MIXERS for options in OPTIONS[name]]


def draw(layout_tokens, heads, key_heads, dim, value_dim, dtype, device=DEVICE, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (layout_tokens, heads, dim), "k": (layout_tokens, key_heads, dim), "v": (layout_tokens, key_heads, value_dim),
        "pad_k": (key_heads, dim), "pad_v": (key_heads, value_dim), "bias": (layout_tokens, heads),
    }  # fmt: skip
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def on_cpu(x, dtype=None):
    """Leaves for the definitions, which loop and are quicker there."""
    return {name: t.detach().to("cpu", dtype).requires_grad_() for name, t in x.items()}


def random_plan(seed, tokens=50, device=CPU):
    """Tokens in any order, some not asked and some not read; padding keys, ragged tiles, FULL between PARTIAL tiles, labels,
    a query tile without keys and a key tile nobody reads."""
    g = torch.Generator().manual_seed(seed)

    def tiled(values, fill):
        return torch.nn.functional.pad(values, (0, -len(values) % 16), value=fill).view(-1, 16)

    order = torch.randperm(tokens, generator=g)
    q_tokens = tiled(order[:44], NOBODY)
    order = torch.randperm(tokens, generator=g)
    pad = torch.tensor([PADDING])
    k_tokens = tiled(
        torch.cat([order[:16], order[16:20], pad, order[20:30], pad, order[30:46], order[46:48], pad]), NOBODY
    )
    assert k_tokens.shape == (4, 16)
    assert (k_tokens[0] >= 0).all()
    assert (k_tokens[2] >= 0).all()
    full, partial = lists_of([[0, 2], [2], []]), lists_of([[1], [0, 1], []])
    labels = tuple(torch.randint(0, 3, t.shape, generator=g) for t in (q_tokens, k_tokens))
    places = tuple(torch.randint(0, 9, t.shape, generator=g) for t in (q_tokens, k_tokens))
    return make_plan(
        q_tokens, k_tokens, full, partial, tiles=(16, 16), tokens=tokens, device=device, labels=labels, places=places
    )


def run(x, plan, impl, table, cotangents):
    y, lse = attend(
        x["q"], x["k"], x["v"], plan, table=table, pad_kv=(x["pad_k"], x["pad_v"]), bias=x["bias"], impl=impl
    )  # fmt: skip
    seen = lse.isfinite()
    loss = (y * cotangents[0].to(y.dtype)).sum() + (torch.where(seen, lse, 0) * cotangents[1].to(lse.dtype)).sum()
    return y.detach(), lse.detach(), dict(zip(x, torch.autograd.grad(loss, list(x.values()))))


def products(cotangent, v):
    """Largest product of a cotangent and a value: gradients of q and k are made of differences of such numbers."""
    v = v.detach().cpu().float().repeat_interleave(cotangent.shape[1] // v.shape[1], dim=1)
    return torch.einsum("tne,sne->tsn", cotangent.float(), v).abs().max()


def check_plan(seed, dtype, rope, heads=4, key_heads=2, dim=8, value_dim=12):
    plan, there = (random_plan(seed, device=torch.device(device)) for device in ("cpu", DEVICE))
    x = draw(plan.tokens, heads, key_heads, dim, value_dim, dtype)
    g = torch.Generator().manual_seed(1)
    shapes = (plan.tokens, heads, value_dim), (plan.tokens, heads)
    cotangents = [torch.randn(shape, generator=g) for shape in shapes]
    phi = 6 * torch.rand(9, dim // 2, generator=g, dtype=torch.float64)
    table = (phi.cos().float(), phi.sin().float()) if rope else None
    high, high_lse, high_grads = run(on_cpu(x, torch.float64), plan, "naive", table, cotangents)
    low, low_lse, low_grads = run(on_cpu(x), plan, "naive", table, cotangents)
    inner = {name: surrounded(t) if name in "qkv" else t for name, t in x.items()}
    table = None if table is None else tuple(t.to(DEVICE) for t in table)
    got, lse, grads = run(inner, there, "triton", table, [t.to(DEVICE) for t in cotangents])
    got, lse = got.cpu(), lse.cpu()
    empty = high_lse == -math.inf
    assert empty.any()
    assert torch.equal(lse == -math.inf, empty)
    assert (got[empty] == 0).all()
    assert_within_budget(got, low, high)
    in_type = lse.masked_fill(empty, 0)  # rotated rows are rounded to the inputs' type before they are multiplied
    assert_within_budget(
        in_type.to(dtype), low_lse.masked_fill(empty, 0).to(dtype), high_lse.masked_fill(empty, 0), name="log-sum-exp"
    )
    scale = products(cotangents[0], x["v"])
    for name in x:
        assert grads[name].dtype == x[name].dtype
        of = scale if name in "qk" else 0.0
        assert_within_budget(
            grads[name].cpu(), low_grads[name], high_grads[name], factor=3.0, name=f"gradient of {name}", scale=of
        )
    assert (grads["q"].cpu()[empty.all(1)] == 0).all()


@needs_triton
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_a_random_plan(dtype, rope, nan_in_new_memory):
    check_plan(0, dtype, rope)


@needs_triton
def test_kernel_with_odd_head_sizes(nan_in_new_memory):
    check_plan(1, torch.float32, True, heads=1, key_heads=1, dim=20, value_dim=33)


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 32), (128, 128), (256, 256)])
def test_kernel_on_a_random_plan_on_gpu(dtype, rope, dim, value_dim, nan_in_new_memory):
    for seed in range(3):
        check_plan(seed, dtype, rope, dim=dim, value_dim=value_dim)


def mix(name, x, layout, options, impl, padded=True):
    pad_kv = (x["pad_k"], x["pad_v"]) if padded else None
    return MIXERS[name](x["q"], x["k"], x["v"], layout, rope=Rope(), pad_kv=pad_kv, impl=impl, **options)


def check_mixer(name, options, layout, dtype, padded, heads=2, key_heads=1, dim=8, value_dim=12):
    x = draw(layout.tokens, heads, key_heads, dim, value_dim, dtype)
    del x["bias"]
    leaves = list(x) if padded and name == "window" else ["q", "k", "v"]
    cotangent = torch.randn(layout.tokens, heads, value_dim, generator=torch.Generator().manual_seed(1))

    def whole(x, impl):
        y = mix(name, x, layout, options, impl, padded)
        grads = torch.autograd.grad(y, [x[leaf] for leaf in leaves], cotangent.to(y), allow_unused=True)
        return y.detach().cpu(), [None if g is None else g.cpu() for g in grads]

    high, high_grads = whole(on_cpu(x, torch.float64), "naive")
    low, low_grads = whole(on_cpu(x), "naive")
    got, grads = whole({n: surrounded(t) if n in "qkv" else t for n, t in x.items()}, "triton")
    assert got.dtype == dtype
    assert_within_budget(got, low, high, name=f"{name} {options} {layout.grids}")
    scale = max(products(cotangent, x["v"]), *(c.abs().max() for c in high_grads if c is not None))
    for leaf, a, b, c in zip(leaves, grads, low_grads, high_grads):
        if c is None:  # no window has a padding slot
            assert (a == 0).all()
        else:
            where = f"{name} {options} {layout.grids}: gradient of {leaf}"
            assert_within_budget(a, b, c, factor=3.0, name=where, scale=scale)


@needs_triton
@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernel_equals_definition(name, options, nan_in_new_memory):
    for layout in LAYOUTS.values():
        check_mixer(name, options, layout, torch.float32, True)


@needs_triton
@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernel_in_half_precision_without_padding_key(name, options, nan_in_new_memory):
    check_mixer(name, options, LAYOUTS["two images, two scales"], torch.float16, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernel_equals_definition_on_gpu(name, options, dtype, nan_in_new_memory):
    for layout in LAYOUTS.values():
        for padded in (True, False):
            check_mixer(name, options, layout, dtype, padded, heads=4, key_heads=2, dim=64, value_dim=64)
    check_mixer(
        name, options, Layout(((37, 21), (16, 24)), (0, 0)), dtype, True, heads=2, key_heads=2, dim=64, value_dim=64
    )


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_packed_images_do_not_touch_each_other(name, options, impl):
    one, two = Layout(((5, 6), (3, 3)), (0, 0)), Layout(((5, 6), (3, 3), (4, 7)), (0, 0, 1))
    x = {n: t.detach() for n, t in draw(two.tokens, 2, 2, 8, 8, torch.float32).items()}
    n = one.tokens
    together = mix(name, x, two, options, impl)
    first = {key: t[:n] if key in "qkv" else t for key, t in x.items()}
    assert torch.equal(together[:n], mix(name, first, one, options, impl))
    x |= {key: torch.cat((x[key][:n], torch.full_like(x[key][n:], math.nan))) for key in "qkv"}
    assert torch.equal(mix(name, x, two, options, impl)[:n], together[:n])


@needs_triton
@pytest.mark.parametrize(("name", "options"), CASES[1:2] + CASES[-1:])
def test_large_logits(name, options):
    x = {n: t.detach() for n, t in draw(30, 2, 2, 8, 8, torch.float32).items()}
    x["q"] = x["q"] * 60
    layout = Layout(((5, 6),), (0,))
    low, high = (mix(name, on_cpu(x, dtype), layout, options, "naive").detach() for dtype in (None, torch.float64))
    assert_within_budget(mix(name, x, layout, options, "triton").cpu(), low, high, factor=4.0)


@needs_triton
@pytest.mark.parametrize(("name", "options"), CASES[1:2] + CASES[-1:])
def test_the_compiler_knows_the_operators(name, options):
    layout = Layout(((2, 3),), (0,))
    x = draw(6, 1, 1, 8, 8, torch.float32)
    del x["bias"]
    numbers = [4, 2, 2, 3] if name == "window" else [2, 3, 0]
    pads = (x["pad_k"], x["pad_v"]) if name == "window" else (None, None)
    op = getattr(torch.ops.hrsam, f"{name}_attention").default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (x["q"], x["k"], x["v"], *pads, numbers, [1e4, 0.5], 0.3), test_utils=tests)

    def loss(q, k, v, pad_k, pad_v):
        y = {"q": q, "k": k, "v": v, "pad_k": pad_k, "pad_v": pad_v}
        return mix(name, y, layout, options, "triton").square().sum()

    leaves = list(x.values())[: 5 if name == "window" else 3]
    want = torch.autograd.grad(loss(**x), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(**x), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    again = torch.autograd.grad(compiled(**x), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def brute_window(grids, window, shift, padded):
    """Pairs (query token, key token or −1) with how often, by looping over pixels of padded grids."""
    pairs, start = {}, 0
    before = (window - shift) % window
    for rows, cols in grids:
        for y in range(rows):
            for x in range(cols):
                y0, x0 = (y + before) // window * window - before, (x + before) // window * window - before
                for ky in range(y0, y0 + window):
                    for kx in range(x0, x0 + window):
                        inside = 0 <= ky < rows and 0 <= kx < cols
                        if inside or padded:
                            pair = start + y * cols + x, start + ky * cols + kx if inside else -1
                            pairs[pair] = pairs.get(pair, 0) + 1
        start += rows * cols
    return pairs


def pairs_of(plan):
    pairs = {}
    q_slots, k_slots = plan.slots
    for tile, row in enumerate(q_slots.tolist()):
        full, partial = plan.keys_of(tile)
        for other in full:
            assert (k_slots[other] >= 0).all()
        for slot, token in enumerate(row):
            for other in full + partial if token >= 0 else ():
                for at, key in enumerate(k_slots[other].tolist()):
                    label = not plan.labelled or other in full or plan.q_labels[tile, slot] == plan.k_labels[other, at]
                    if key != NOBODY and label:
                        pairs[token, key] = pairs.get((token, key), 0) + 1
    return pairs


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("grids", "window", "shift"), [(((5, 7), (2, 2)), 4, 2), (((9, 12),), 8, 4), (((5, 6),), 3, 1), (((20, 9),), 16, 8)]
)
def test_window_plan_lists_every_pair_once(grids, window, shift, padded):
    numbers = (window, shift, *(n for grid in grids for n in grid))
    for tiles in ((32, 16), (64, 64)):
        plan = tile_plan(numbers, tiles, padded, CPU)
        assert pairs_of(plan) == brute_window(grids, window, shift, padded)
        assert plan.covers


def test_window_plan_of_whole_sub_tiles_needs_few_masks():
    plan = tile_plan((16, 0, 64, 64), (64, 64), True, CPU)
    assert plan.stats() == {"pairs": 64 * 64, "visited": 1 / 16, "full": 1 / 16}
    shifted = tile_plan((16, 8, 64, 64), (64, 64), True, CPU)
    assert len(shifted.q_tokens) == 64  # padding never asks
    assert len(shifted.lists[1]) == 9 * 16 + 12 * 4 + 4  # inner windows, edges, corners


def test_full_plan_lists_every_pair_once():
    plan = full_plan((3, 3, 0, 2, 2, 0, 4, 5, 1), (16, 8), False, CPU)
    want = {(q, k): 1 for q in range(33) for k in range(33) if (q < 13) == (k < 13)}
    assert pairs_of(plan) == want
    assert plan.covers
    assert plan.stats()["full"] > 0


def test_plans_are_cached_and_refuse_nonsense():
    numbers = (4, 2, 5, 6)
    assert tile_plan(numbers, (16, 16), True, CPU) is tile_plan(numbers, (16, 16), True, CPU)
    rows = torch.tensor([[0, 1], [1, 2]])
    none, one, two = lists_of([[], []]), lists_of([[0]]), lists_of([[0], [0]])
    with pytest.raises(ValueError, match="two query slots"):
        make_plan(rows, rows[:1], two, none, tiles=(2, 2), tokens=3, device=CPU)
    with pytest.raises(ValueError, match="two key slots"):
        make_plan(rows[:1], rows, one, lists_of([[1]]), tiles=(2, 2), tokens=3, device=CPU)
    runs = torch.tensor([[2, 2], [0, 2]])  # tokens 2, 3 and 0, 1
    assert make_plan(runs, runs, two, none, tiles=(2, 2), tokens=4, device=CPU, runs=True).covers
    with pytest.raises(ValueError, match="two key slots"):
        make_plan(runs, torch.tensor([[1, 2], [0, 2]]), two, none, tiles=(2, 2), tokens=4, device=CPU, runs=True)
    with pytest.raises(ValueError, match="2 blocks of query tiles need as many lists"):
        make_plan(rows, rows[:1], one, one, tiles=(2, 2), tokens=3, device=CPU)


def test_user_errors():
    plan = random_plan(0)
    x = draw(50, 2, 2, 8, 8, torch.float64, "cpu")
    with pytest.raises(ValueError, match="bias is"):
        attend(x["q"], x["k"], x["v"], plan, bias=x["bias"][:, :1])
    with pytest.raises(ValueError, match="layout has 50 tokens"):
        attend(x["q"][1:], x["k"], x["v"], plan)
    if has_triton():
        with pytest.raises(ValueError, match="float64"):
            attend(x["q"], x["k"], x["v"], plan, pad_kv=(x["pad_k"], x["pad_v"]), impl="triton")
        wide = draw(50, 1, 1, 260, 8, torch.float32, "cpu")
        with pytest.raises(ValueError, match="up to 256 channels"):
            attend(wide["q"], wide["k"], wide["v"], plan, pad_kv=(wide["pad_k"], wide["pad_v"]), impl="triton")
