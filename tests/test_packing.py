"""Packed pictures: packs, shares and weights as numbers; packed model and losses against one picture after the other."""

import random
from dataclasses import replace
from statistics import mean

import pytest
import torch

from hrsam.bench.flops import flops
from hrsam.bench.packing import picture_sizes
from hrsam.data.packing import Counts, best_fit, longest_first, loss_total, loss_weights
from hrsam.layout import Layout, boundaries_on
from hrsam.losses import embedding_mse, weighted_sum
from hrsam.models.cost import encode_cost
from hrsam.models.model import Embedding
from hrsam.models.presets import PRESETS
from hrsam.ops import MIXERS
from tests.builders import small_model

MIX = picture_sizes(4096, (640, 2048), 16)  # long side 640…2048, aspect ½…1
SIZES = [(64, 96), (16, 16), (80, 48), (64, 96), (32, 112), (48, 48)]


def tokens(size):
    return size[0] // 16 * (size[1] // 16)


# ---------------------------------------------------------------- packs


def test_best_fit_by_hand():
    # 7 and 5 open packs; 4 fits the second only, 3 the first exactly; 2 must open a third, and 1 finds less room in the second
    assert best_fit([2, 3, 7, 5, 4, 1], 10) == [[2, 1], [3, 4, 5], [0]]
    assert best_fit([], 10) == []
    assert best_fit([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="a shortest length of 0"):
        best_fit([3, 0], 10)
    with pytest.raises(ValueError, match="capacity 0"):
        best_fit([3], 0)


@pytest.mark.parametrize("seed", range(20))
def test_packs_hold_every_picture_once_and_no_more_than_fits(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 130) for _ in range(rng.randint(1, 60))]
    packs = best_fit(lengths, 100)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[i] for i in pack) <= 100
    slack = [100 - sum(lengths[i] for i in pack) for pack in packs]
    for number, pack in enumerate(packs):  # each was opened because its longest fitted into none before it
        assert all(max(lengths[i] for i in pack) > room for room in slack[:number])


def test_packs_are_full():
    lengths = [tokens(size) for size in MIX]
    packs = best_fit(lengths, 16384)
    assert max(lengths) <= 16384
    assert sum(lengths) / (16384 * len(packs)) >= 0.98


def test_longest_first_by_hand():
    assert longest_first([3, 9, 4, 6], 2) == [[0, 1], [2, 3]]
    assert longest_first([1.0, 1.0, 1.0], 2) == [[0, 2], [1]]
    assert longest_first([5.0], 3) == [[0], [], []]
    assert longest_first([], 2) == [[], []]
    with pytest.raises(ValueError, match="0 ranks"):
        longest_first([1.0], 0)


def imbalance(costs, shares):
    loads = [sum(costs[i] for i in share) for share in shares]
    return max(loads) * len(loads) / sum(loads)


@pytest.mark.parametrize("mixer", ["window", "full"])
def test_ranks_have_equal_work(mixer):
    """64 pictures on 8 ranks, 64 times: the busiest has at most 1.02 times the mean; equal counts are far from that, and with
    attention over the whole picture equal tokens too."""
    config = PRESETS["hrsam_pp_b"]().encoder
    config = config if mixer == "window" else replace(config, mixers=(("full", {}),))
    by_cost, by_tokens, by_count = [], [], []
    for first in range(0, 4096, 64):
        costs = [encode_cost(config, *size).flops for size in MIX[first : first + 64]]
        by_cost.append(imbalance(costs, longest_first(costs, 8)))
        by_tokens.append(imbalance(costs, longest_first([tokens(size) for size in MIX[first : first + 64]], 8)))
        by_count.append(imbalance(costs, [range(rank, 64, 8) for rank in range(8)]))
    assert by_cost[0] <= 1.02
    assert mean(by_cost) <= 1.01
    assert sum(share > 1.02 for share in by_cost) <= 1
    assert mean(by_count) > 1.2
    assert mixer == "window" or mean(by_tokens) > 1.03


@pytest.mark.parametrize("preset", ["hrsam_t", "hrsam_pp_b"])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_cost_is_that_of_the_benchmarks(preset, side):
    config = PRESETS[preset]().encoder
    cost = encode_cost(config, side, side)
    scans = len(config.scan_at) * (2 if config.anchor_side else 1)
    assert cost.tokens == (side // 16) ** 2 + (1024 if config.anchor_side else 0)
    assert cost.flops - flops(config, side) == 14 * scans * cost.tokens * config.width * config.state
    assert encode_cost(config, side - 15, side - 1) == cost  # a patch begun is a patch
    with pytest.raises(ValueError, match="mixer 'lsh' is not known"):
        encode_cost(type(config)(mixers=(("lsh", {}),)), side, side)


# ---------------------------------------------------------------- weights


COUNTS = [Counts(2, 50, 12000), Counts(1, 2, 500), Counts(3, 7, 1700), Counts(1, 1, 256)]


def test_weights_by_hand():
    assert loss_weights("image", COUNTS, loss_total("image", COUNTS)) == pytest.approx([1 / 8, 1 / 4, 1 / 12, 1 / 4])
    assert loss_weights("object", COUNTS, loss_total("object", COUNTS)) == pytest.approx([1 / 7] * 4)
    assert loss_weights("token", COUNTS, loss_total("token", COUNTS)) == pytest.approx([n / 124 for n in (50, 2, 7, 1)])
    whole = 2 * 12000 + 500 + 3 * 1700 + 256
    assert loss_weights("pixel", COUNTS, loss_total("pixel", COUNTS)) == pytest.approx(
        [n / whole for n in (12000, 500, 1700, 256)]
    )


@pytest.mark.parametrize("reduction", ["image", "object", "token", "pixel"])
def test_weights_of_any_cut_are_those_of_the_step(reduction):
    whole = loss_weights(reduction, COUNTS, loss_total(reduction, COUNTS))
    cut = [COUNTS[:1], COUNTS[1:3], COUNTS[3:]]
    total = sum(loss_total(reduction, part) for part in cut)
    assert [w for part in cut for w in loss_weights(reduction, part, total)] == pytest.approx(whole, rel=1e-15)
    assert sum(w * c.objects for w, c in zip(whole, COUNTS)) == pytest.approx(1, rel=1e-15)
    assert loss_weights(reduction, COUNTS, total, ranks=4) == pytest.approx([4 * w for w in whole], rel=1e-15)
    assert loss_weights(reduction, [], total) == []


# ---------------------------------------------------------------- the encoder


def double_model(**changes):
    """All parameters count in the result: none is left at 0 or 1."""
    model = small_model(64, **changes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def pictures(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes]


def random_sizes(seed):
    """2 to 5 pictures; one of them is one token, and two of them may be equal neighbours."""
    rng = random.Random(seed)
    sizes = [(16 * rng.randint(1, 7), 16 * rng.randint(1, 7)) for _ in range(rng.randint(1, 3))]
    sizes.insert(rng.randrange(len(sizes) + 1), (16, 16))
    return sizes + sizes[-1:] * rng.randint(0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_packed_equals_one_by_one_through_encoder_neck_and_decoder(seed):
    model, images = double_model(), pictures(random_sizes(seed))
    points = torch.tensor([[[3.0, 5.0], [7.0, 9.0]]])
    with torch.no_grad():
        for image, packed in zip(images, model.encoder.forward_packed(images), strict=True):
            alone = model.encoder(image.unsqueeze(0))
            logits = []
            for features in (packed.unsqueeze(0), alone):
                positions = model.dense_positions(tuple(features.shape[2:]))
                logits.append(model.decode(Embedding(features, positions), points, torch.tensor([[1, 0]])).logits)
            assert alone.dtype == torch.float64
            torch.testing.assert_close(packed.unsqueeze(0), alone, atol=1e-10, rtol=0)
            torch.testing.assert_close(*logits, atol=1e-10, rtol=0)


def largest_difference(model, other):
    """Largest difference of two models' gradients, of each parameter in units of its largest gradient.

    A key's bias has no influence and a gradient of rounding only, so the unit is at least a millionth of the largest of all.
    """
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters()) if q.grad is not None]
    assert len(pairs) > 50
    least = 1e-6 * max(b.abs().max() for _, b in pairs)
    return max(float((a - b).abs().max() / max(b.abs().max(), least)) for a, b in pairs)


def accumulate(encoder, images, targets, weights, cuts):
    for cut in cuts:
        maps = encoder.forward_packed([images[i] for i in cut])
        losses = [embedding_mse(m, targets[i]) for m, i in zip(maps, cut)]
        weighted_sum(losses, [weights[i] for i in cut]).backward()


@pytest.mark.parametrize("reduction", ["image", "token"])
def test_gradients_equal_the_formula_however_the_step_is_cut(reduction):
    """The formula, one by one; then in 1, 2 and 4 packs, and shared by 1, 2 and 4 ranks whose gradients are averaged."""
    plain = double_model().encoder
    images = pictures(SIZES)
    generator = torch.Generator().manual_seed(3)
    counts = [Counts(1, tokens(size), size[0] * size[1]) for size in SIZES]
    targets = [torch.randn(256, h // 16, w // 16, generator=generator, dtype=torch.float64) for h, w in SIZES]
    losses = [((plain(x.unsqueeze(0))[0] - t) ** 2).mean() for x, t in zip(images, targets)]
    if reduction == "image":
        explicit = sum(losses) / len(losses)
    else:
        explicit = sum(loss * c.tokens for loss, c in zip(losses, counts)) / sum(c.tokens for c in counts)
    explicit.backward()

    whole = double_model().encoder
    total = loss_total(reduction, counts)
    everything = list(range(len(SIZES)))
    accumulate(whole, images, targets, loss_weights(reduction, counts, total), [everything])
    assert largest_difference(whole, plain) <= 1e-12
    for parts in (2, 4):
        cuts = [everything[part::parts] for part in range(parts)]
        split = double_model().encoder
        accumulate(split, images, targets, loss_weights(reduction, counts, total), cuts)
        assert largest_difference(split, whole) <= 1e-12

        shares = longest_first([c.tokens for c in counts], parts)
        assert shares != cuts
        ranks = [double_model().encoder for _ in range(parts)]
        for rank, share in zip(ranks, shares):
            accumulate(rank, images, targets, loss_weights(reduction, counts, total, ranks=parts), [share])
        with torch.no_grad():
            for mean, *others in zip(*(rank.parameters() for rank in ranks)):
                if mean.grad is not None:
                    mean.grad.copy_(sum((o.grad for o in others), start=mean.grad) / parts)
        assert largest_difference(ranks[0], whole) <= 1e-12


def test_nothing_leaks_from_one_picture_to_another():
    """Exactly 0, for every pair, even where a loss is huge."""
    encoder = double_model().encoder.train()
    images = [image.requires_grad_() for image in pictures(SIZES)]
    maps = encoder.forward_packed(images)
    for i, features in enumerate(maps):
        grads = torch.autograd.grad(1e9 * features.square().sum(), images, retain_graph=True)
        for j, grad in enumerate(grads):
            assert bool(grad.any()) == (i == j)
            assert grad.isfinite().all()


@pytest.mark.parametrize("drop_path", [0.0, 0.7])
def test_a_picture_draws_its_own_stochastic_depth(drop_path):
    encoder = double_model(drop_path=drop_path).encoder.train()
    images = pictures(SIZES)

    def generators():
        return [torch.Generator().manual_seed(100 + i) for i in range(len(SIZES))]

    with torch.no_grad():
        packed = encoder.forward_packed(images, generators())
        for i, g in enumerate(generators()):
            torch.testing.assert_close(encoder.forward_packed([images[i]], [g])[0], packed[i], atol=1e-10, rtol=0)
        others = [torch.Generator().manual_seed(i) for i in range(len(SIZES))]
        changed = [not torch.allclose(a, b) for a, b in zip(encoder.forward_packed(images, others), packed)]
        assert all(changed) if drop_path else not any(changed)
        evaluated = encoder.eval().forward_packed(images, generators())
        assert (not torch.allclose(evaluated[0], packed[0])) == bool(drop_path)


def test_pictures_of_one_size_take_the_path_of_a_batch():
    """The same operations on the same shapes, so the same bits and no more work."""
    encoder = small_model(64).encoder.train()
    batch = torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    shapes = []
    for module in encoder.modules():
        module.register_forward_pre_hook(lambda module, given: shapes.append((type(module), given[0].shape)))
    with torch.no_grad():
        dense = encoder(batch)
        work = shapes[1:]  # without the encoder itself
        shapes.clear()
        assert torch.equal(torch.stack(encoder.forward_packed(list(batch))), dense)
        assert shapes == work
        assert torch.equal(encoder.forward_packed([batch[0]])[0], encoder(batch[:1])[0])


def test_wrong_packs_are_refused():
    encoder = small_model(64).encoder
    picture = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match="no images"):
        encoder.forward_packed([])
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder.forward_packed([picture, torch.zeros(3, 32, 40)])
    with pytest.raises(ValueError, match=r"got \(1, 32, 32\)|\(B, 3, H, W\)"):
        encoder.forward_packed([picture[0]])
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        encoder.forward_packed([picture, picture], [torch.Generator()])


@pytest.mark.parametrize("mixer", MIXERS)
def test_boundaries_are_right_by_construction(mixer):
    """Sequences are never given as numbers: they come from a layout, int32, rising, ending with the last token."""
    layout = Layout(((2, 3), (1, 1), (4, 2)), (0, 1, 1))
    bounds = boundaries_on(layout, False, torch.device("cpu"))
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 6, 7, 15]
    with pytest.raises(ValueError, match="token grid of 0x3"):
        Layout(((0, 3),), (0,))
    q = torch.zeros(14, 1, 8)
    with pytest.raises(ValueError, match="15 tokens"):
        MIXERS[mixer](q, q, q, layout)


@pytest.mark.gpu
def test_nothing_is_prepared_for_a_size():
    """cuDNN takes depthwise convolutions of maps with channels last, and compiles for each new size of them."""
    encoder = small_model(64).cuda().encoder.train()
    seen = []
    encoder.out_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    images = [torch.randn(3, *size, device="cuda", requires_grad=True) for size in ((64, 96), (48, 32), (48, 32))]
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profiler:
        packed = encoder.forward_packed(images)
        sum(m.float().square().sum() for m in packed).backward()
        encoder.encode(images)
    assert seen == [True] * 5
    assert not [event.key for event in profiler.key_averages() if "cudnn" in event.key.lower()]
