"""The course of the rate, groups of parameters, gradients in one vector, steps that are not made, averaged weights."""

import math

import pytest
import torch
from torch import nn

from hrsam.models.model import HRSAM
from hrsam.optim import Average, Gradients, Phase, Recipe, Watch, build_optimizer, move, parameter_groups
from tests.builders import small_config

PHASES = (Phase(side=64, batch=1, steps=60, lr=1e-3), Phase(side=128, batch=1, steps=40, lr=5e-4))


def one_phase(steps, lr=1e-3, **changes):
    return Recipe(phases=(Phase(side=64, batch=1, steps=steps, lr=lr),), **changes)


def test_learning_rates():
    recipe = Recipe(phases=PHASES, warmup=10, decay=0.2, final_lr=0.1)
    assert recipe.steps == 100
    assert [recipe.phase_at(step) for step in (0, 59, 60, 99, 100)] == [PHASES[0]] * 2 + [PHASES[1]] * 3
    got = [recipe.lr_at(step) for step in (0, 4, 9, 59, 60, 80, 90, 100)]
    assert got == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4 * 0.55, 5e-4 * 0.1])
    rates = [recipe.lr_at(step) for step in range(80, 101)]
    assert rates == sorted(rates, reverse=True)
    assert one_phase(10, warmup=0).lr_at(0) == pytest.approx(1e-3)


def test_the_papers_schedule():
    """Linear over 1,500 steps, then linear to 0: PolyLR of power 1 that begins when the warm-up ends."""
    recipe = one_phase(40_000, lr=1e-4, warmup=1500, decay=1.0, final_lr=0.0)
    assert recipe.lr_at(749) == pytest.approx(0.5e-4)
    assert recipe.lr_at(1499) == recipe.lr_at(1500) == 1e-4
    for step in (1500, 20_750, 39_999, 40_000):
        assert recipe.lr_at(step) == pytest.approx(1e-4 * (40_000 - step) / 38_500, abs=1e-18)


def test_a_warm_up_as_long_as_the_run():
    recipe = one_phase(100, warmup=200, decay=1.0)
    assert [recipe.lr_at(step) for step in (0, 99)] == pytest.approx([1e-3 / 200, 1e-3 / 2])


def groups_by_name(model, weight_decay, layer_decay=1.0):
    """{name: (weight decay, scale)}"""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay, layer_decay)
    found = [(names[id(p)], (g["weight_decay"], g["lr_scale"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_only_matrices_decay():
    model = HRSAM(small_config())
    found = groups_by_name(model, 0.05)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert set(found.values()) == {(0.05, 1.0), (0.0, 1.0)}
    for name in (
        "encoder.patch_embed.weight",
        "encoder.blocks.0.attn.qkv.weight",
        "encoder.scans.0.in_proj.weight",
        "encoder.laterals.0.0.weight",
        "encoder.out_conv.weight",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight",
        "prompt_encoder.mask_downscaling.0.weight",
    ):
        assert found[name][0] == 0.05, name
    for name in (
        "encoder.pos_embed",
        "encoder.patch_embed.bias",
        "encoder.blocks.0.attn.padding",
        "encoder.blocks.0.norm1.weight",
        "encoder.scans.0.A_log",
        "encoder.scans.0.gamma",
        "mask_decoder.mask_tokens.weight",
        "mask_decoder.iou_token.weight",
        "prompt_encoder.no_mask_embed.weight",
        "prompt_encoder.not_a_point_embed.weight",
        "prompt_encoder.point_embeddings.0.weight",
    ):
        assert found[name][0] == 0.0, name


def test_layers_decay_once_each():
    found = groups_by_name(HRSAM(small_config(depth=4)), 0.05, layer_decay=0.5)
    for index in range(4):
        of_block = {scale for name, (_, scale) in found.items() if f".blocks.{index}." in name}
        assert of_block == {0.5 ** (4 - index)}
    assert found["encoder.pos_embed"] == (0.0, 0.5**5)
    assert found["encoder.patch_embed.weight"] == (0.05, 0.5**5)
    rest = {
        name: scale for name, (_, scale) in found.items() if ".blocks." not in name and "encoder.p" not in name[:10]
    }
    assert len(rest) > 100
    assert set(rest.values()) == {1.0}  # scans, laterals, neck, prompts, decoder
    paper = groups_by_name(HRSAM(small_config(depth=12, scan_at=(2, 5, 8, 11))), 0.05, layer_decay=0.9)
    assert paper["encoder.blocks.0.mlp.fc1.weight"][1] == pytest.approx(0.282, abs=5e-4)
    assert paper["encoder.blocks.11.mlp.fc1.weight"][1] == pytest.approx(0.9)


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert groups_by_name(model, 0.05) == {"1.weight": (0.05, 1.0), "1.bias": (0.0, 1.0)}


def test_each_group_moves_at_its_own_rate():
    model = HRSAM(small_config(depth=4))
    optimizer = build_optimizer(model, one_phase(10, layer_decay=0.5, weight_decay=0.0))
    Gradients(list(model.parameters())).flat.fill_(1.0)  # Adam's first step is the rate
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(optimizer, 1e-2, torch.tensor(0.0))
    for name, scale in (
        ("encoder.patch_embed.weight", 0.5**5),
        ("encoder.blocks.3.norm1.bias", 0.5),
        ("encoder.out_conv.weight", 1),
    ):
        moved = before[name] - dict(model.named_parameters())[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * scale), rtol=1e-3, atol=1e-7)


def test_gradients_lie_in_one_vector():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(1, 5))  # the last one is not used
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("2")})
    gradients = Gradients(list(model.parameters()))
    x = torch.randn(6, 3)
    for part in x.split(3):
        model[:2](part).square().mean().div(2).backward()
    twin(x).square().mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(gradients.flat[: len(wanted)], wanted)
    assert not gradients.flat[len(wanted) :].any()

    norm = gradients.clip(0.1)
    assert norm.item() == pytest.approx(wanted.norm().item(), rel=1e-5)
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad * (0.1 / norm), rtol=1e-4, atol=0)
    assert gradients.clip(1.0).item() == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(gradients.flat.norm().item(), 0.1, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_made(bad, place):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 5))
    optimizer = build_optimizer(nn.ParameterList([weight]), one_phase(10))
    gradients, watch = Gradients([weight]), Watch(torch.device("cpu"))

    def step(number, loss=1.0, gradient=1.0):
        gradients.flat.fill_(1.0)[7] = gradient
        watch.see(number, torch.tensor(loss), gradients.clip(1.0))
        move(optimizer, 1e-2, watch.found_inf)

    def everything():
        return [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]

    step(1)
    assert watch.look() is None
    before = everything()
    step(2, **{place: bad})
    step(3)  # nobody has looked yet
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    number, loss, norm = watch.look()
    assert number == 2
    assert math.isfinite(loss) == (place == "gradient")
    assert math.isfinite(norm) == (place == "loss")


def test_averaged_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    average = Average(model, ema=0.9)
    name, values = "0.weight", []
    mean = model.state_dict()[name].clone()
    for step in range(200):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        average.update(step)
        past = min(0.9, (1 + step) / (10 + step))
        mean = past * mean + (1 - past) * model.state_dict()[name]
        values.append(past)
    assert values[0] == 0.1
    assert values[-1] == 0.9
    state = average.state(model)
    assert state.keys() == model.state_dict().keys()
    torch.testing.assert_close(state[name], mean)
    assert torch.equal(state["0.bias"], model[0].bias)
    other = Average(model, ema=0.9)
    other.load(state)
    assert torch.equal(other.state(model)[name], state[name])
