"""The restated reference computes what our encoder computes, with the data flow that it is a baseline for."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from hrsam.bench import reference_flow
from hrsam.bench.models import redraw
from hrsam.bench.reference_flow import ReferenceFlow
from hrsam.bench.train_step import step
from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from tests.numerics import assert_within_budget

TINY = {"width": 48, "heads": 3, "depth": 4, "scan_at": (1, 3), "state": 4}
SMALL_WINDOWS = (("window", {"window": 4, "shift": 0}), ("window", {"window": 4, "shift": 2}))


def random_encoder(anchor_side, **changes):
    config = EncoderConfig(**{**TINY, "anchor_side": anchor_side, **changes})
    return redraw(HRSAM(ModelConfig("test", config, decoder=False)), seed=1).encoder


@pytest.mark.parametrize("anchor_side", [None, 64])
@pytest.mark.parametrize(("size", "changes"), [((80, 288), {}), ((64, 64), {}), ((96, 112), {"mixers": SMALL_WINDOWS})])
@torch.no_grad()
def test_equals_the_encoder(anchor_side, size, changes):
    encoder = random_encoder(anchor_side, **changes)
    pixels = torch.randn(2, 3, *size)
    single = encoder(pixels), ReferenceFlow(encoder)(pixels)
    encoder.double()
    double = encoder(pixels.double()), ReferenceFlow(encoder)(pixels.double())
    assert single[1].shape == (2, 256, size[0] // 16, size[1] // 16)
    assert (double[1] - double[0]).abs().max() <= 1e-11 * double[0].abs().max()
    assert_within_budget(single[1], single[0], double[0])


def test_gradients_equal_the_encoders():
    encoder = random_encoder(64, mixers=SMALL_WINDOWS).double()
    x, w = torch.randn(1, 3, 80, 96, dtype=torch.float64), torch.randn(1, 256, 5, 6, dtype=torch.float64)
    ours, flow = step(encoder, x, w), step(ReferenceFlow(encoder), x, w)
    assert ours[1].keys() == flow[1].keys()
    assert len(ours[1]) == len(list(encoder.parameters()))
    for name, gradient in ours[1].items():
        assert gradient.abs().max() > 0, name
        assert (flow[1][name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def test_tables_are_made_again_after_the_cache_was_full():
    encoder = random_encoder(None)
    flow = ReferenceFlow(encoder)
    with torch.no_grad():
        for side in (16, 32, 48, 64, 16):
            pixels = torch.randn(1, 3, side, side)
            assert (flow(pixels) - encoder(pixels)).abs().max() < 1e-4
            assert 0 < len(flow.cache) <= 4


def test_scans_get_long_float32_sequences_channels_first(monkeypatch):
    seen = []

    def scan(u, r, dt_bias, A_log, B, C, D):
        seen.append([(t.shape, t.dtype, t.is_contiguous()) for t in (u, r, B, C)])
        return u

    monkeypatch.setitem(reference_flow.SCANS, "torch", scan)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ReferenceFlow(random_encoder(64))(torch.randn(2, 3, 48, 80))
    lengths = [3 * n for n in (15, 16, 31) * 2]  # each scale by itself, then both
    wide = [[(2, 48, n), (2, 48, n), (2, 4, n), (2, 4, n)] for n in lengths]
    assert seen == [[(torch.Size(s), torch.float32, True) for s in shapes] for shapes in wide]


def test_mamba_is_called_as_it_wants_to_be(monkeypatch):
    """Stands in for mamba-ssm's function with the signature and meaning of its documentation."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None
        assert delta_softplus
        delta = F.softplus(delta + delta_bias[:, None])
        h, y = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
            y.append((h * C[:, None, :, t]).sum(-1))
        return torch.stack(y, dim=2) + D[:, None] * u

    name = "mamba_ssm.ops.selective_scan_interface"
    module = types.ModuleType(name)
    module.selective_scan_fn = selective_scan_fn
    monkeypatch.setitem(sys.modules, name, module)
    for parent in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    encoder = random_encoder(64).double()
    pixels = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        want, got = encoder(pixels), ReferenceFlow(encoder, "mamba")(pixels)
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


def test_our_kernel_can_stand_in_for_mamba():
    pytest.importorskip("triton")
    encoder = random_encoder(None)
    pixels = torch.randn(2, 3, 48, 32)
    if torch.cuda.is_available():
        encoder, pixels = encoder.cuda(), pixels.cuda()
    with torch.no_grad():
        low, got = encoder(pixels), ReferenceFlow(encoder, "triton")(pixels)
        high = ReferenceFlow(encoder.double())(pixels.double())
    assert_within_budget(got, low, high)


def test_a_missing_mamba_says_so():
    if "mamba_ssm" not in sys.modules and reference_flow.find_spec("mamba_ssm") is None:
        assert reference_flow.mamba_missing() == "mamba-ssm is not installed"


def test_what_it_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="no scan 'cuda'; choose one of mamba, triton, torch"):
        ReferenceFlow(random_encoder(None), "cuda")
    encoder = random_encoder(None)
    object.__setattr__(encoder.config, "mixers", (("full", {}),))
    with pytest.raises(ValueError, match="window attention only"):
        ReferenceFlow(encoder)
