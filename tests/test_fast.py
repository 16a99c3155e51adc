"""``model.optimize``: the same answers, faster."""

import pytest
import torch
import torch.nn.functional as F

import hrsam
from hrsam.kernels import has_triton
from hrsam.models.block import Mlp, linear_gelu
from hrsam.models.model import HRSAM
from hrsam.ops import cross
from hrsam.ops.cross import cross_attention
from hrsam.tables import forget

PLAIN = {"compile": False, "graphs": False}


def redrawn(preset, seed=0):
    """A model in which every parameter matters."""
    model = hrsam.build(preset).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt_bias" not in name:
                fan = parameter[0].numel() if parameter.ndim > 1 else 1
                step = torch.randn(parameter.shape, generator=g) * fan**-0.5
                parameter.copy_(step if parameter.ndim > 1 else parameter + 0.1 * step)
    return model


@pytest.fixture(scope="module")
def model():
    return redrawn("hrsam_pp_t")


def picture(height=96, width=160):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def prompts(grid):
    g = torch.Generator().manual_seed(2)
    previous = torch.randn(1, 1, 4 * grid[0], 4 * grid[1], generator=g)
    for clicks, box, earlier, masks in (
        (1, 0, 0, (0,)),
        (3, 1, 1, (0,)),
        (5, 0, 1, (1, 2, 3)),
        (9, 0, 1, (0,)),
        (0, 1, 0, (0,)),
    ):
        points = 90 * torch.rand(1, clicks, 2, generator=g)
        labels = torch.randint(0, 2, (1, clicks), generator=g)
        corners = torch.tensor([[5.0, 8.0, 80.0, 70.0]]) if box else None
        yield points, labels, corners, previous if earlier else None, masks


@pytest.mark.parametrize("preset", ["hrsam_t", "hrsam_pp_t"])
def test_the_same_features_in_float32(preset):
    model = redrawn(preset)
    want, got = (m.encode([picture()])[0].features for m in (model, model.optimize(dtype=torch.float32, **PLAIN)))
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_same_masks_in_float32_with_prompts_filled_up(model):
    fast = model.optimize(dtype=torch.float32, **PLAIN)
    embedding = model.encode([picture()])[0]
    for prompt in prompts(embedding.grid):
        with torch.no_grad():
            want = model.decode(embedding, *prompt)
        got = fast.decode(embedding, *prompt)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.iou, want.iou, rtol=1e-4, atol=1e-5)


def test_sixteen_bits_err_as_autocast_does(model):
    x = model.normalise(picture()).unsqueeze(0)
    with torch.no_grad():
        high = model.encoder(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.encoder(x).float()
    got = model.optimize(**PLAIN).encoder(x)
    assert got.dtype == torch.bfloat16
    assert 0 < (low - high).norm() < 0.1 * high.norm()
    assert (got.float() - high).norm() <= 1.5 * (low - high).norm()


def drawn_mlp():
    torch.manual_seed(0)
    return Mlp(64, 256), 2 * torch.randn(500, 64)


def test_the_gelu_of_a_product():
    mlp, x = drawn_mlp()
    arguments = x, mlp.fc1.weight.detach(), mlp.fc1.bias.detach()
    torch.testing.assert_close(linear_gelu(*arguments), F.gelu(mlp.fc1(x)), rtol=0, atol=1e-3)
    torch.library.opcheck(linear_gelu, arguments)
    want, mlp.fused = mlp(x), True
    torch.testing.assert_close(mlp(x), want, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_mlp_is_no_further_from_the_exact_one_than_sixteen_bits_are(dtype):
    mlp, x = drawn_mlp()
    with torch.no_grad():
        high, low = mlp(x), mlp.to("cuda", dtype)
        plain = low(x.to("cuda", dtype)).float().cpu()
        low.fused = True
        fused = low(x.cuda()).float().cpu()  # tokens come in whatever autocast left them
    assert 0 < (fused - high).norm() <= 1.1 * (plain - high).norm()
    assert not torch.equal(fused, plain)


@pytest.mark.gpu
def test_frozen_mlps_are_fused_on_a_gpu():
    blocks = redrawn("hrsam_pp_t").cuda().encoder.frozen(torch.bfloat16).blocks
    assert all(block.mlp.fused for block in blocks)


def test_the_copy_is_apart_and_training_goes_on(model):
    model = redrawn("hrsam_pp_t", seed=3)
    fast = model.optimize(dtype=torch.float32, **PLAIN)
    x = model.normalise(picture()).unsqueeze(0)
    before = fast.encoder(x)
    model.encoder(x).sum().backward()  # tables made for inference serve training too
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast.encoder(x), before)
    assert isinstance(fast, HRSAM)
    assert not any(p.requires_grad for p in fast.encoder.parameters())


def test_one_picture_at_a_time_gives_equal_bits(model):
    fast = model.optimize(dtype=torch.float32, **PLAIN)
    both = fast.encode([picture(), picture(64, 64)])
    assert torch.equal(both[0].features, fast.encode([picture()])[0].features)
    with pytest.raises(ValueError, match="got no images"):
        fast.encoder.encode([])


def test_what_cannot_be_optimized(model):
    with pytest.raises(ValueError, match="float64"):
        model.optimize(dtype=torch.float64)


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize(("images", "queries", "keys"), [(1, 5, 300), (2, 20, 333), (1, 70, 90)])
def test_attention_in_parts(images, queries, keys, monkeypatch):
    monkeypatch.setattr(cross, "PART", 100)
    forget()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(images, 2, n, 16, generator=g).to(device) for n in (queries, keys, keys))
    torch.testing.assert_close(cross_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)
    forget()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_answer_like_the_plain_model(compile):
    model = redrawn("hrsam_pp_t").cuda()
    fast = model.optimize(compile=compile)
    for size in ((128, 192), (256, 256), (128, 192)):
        x = model.normalise(picture(*size).cuda()).unsqueeze(0)
        with torch.no_grad():
            high = model.encoder(x)
            with torch.autocast("cuda", torch.bfloat16):
                low = model.encoder(x).float()
        assert (fast.encoder(x).float() - high).norm() <= 1.5 * (low - high).norm()
    embedding = model.encode([picture(128, 192).cuda()])[0]
    for prompt in prompts(embedding.grid):
        prompt = [t.cuda() if isinstance(t, torch.Tensor) else t for t in prompt]
        with torch.no_grad():
            want = model.decode(embedding, *prompt).logits
        error = (fast.decode(embedding, *prompt).logits - want).norm() / want.norm()
        assert error < 0.05


@pytest.mark.gpu
def test_graphs_keep_the_tables_that_caches_drop():
    model = redrawn("hrsam_pp_t").cuda()
    fast = model.optimize(compile=False)
    x = model.normalise(picture(128, 192).cuda()).unsqueeze(0)
    embedding = fast.encode([picture(128, 192).cuda()])[0]
    prompt = torch.tensor([[[40.0, 50.0]]], device="cuda"), torch.ones(1, 1, dtype=torch.int64, device="cuda")
    features, logits = fast.encoder(x), fast.decode(embedding, *prompt).logits
    forget()
    zeros = [
        torch.zeros(size, dtype=torch.int32, device="cuda") for size in (32, 128, 512, 2048, 8192) for _ in range(4000)
    ]
    assert torch.equal(fast.encoder(x), features)
    assert torch.equal(fast.decode(embedding, *prompt).logits, logits)
    del zeros


@pytest.mark.gpu
def test_the_encoder_never_waits_and_builds_nothing():
    model = redrawn("hrsam_pp_t").cuda()
    x = model.normalise(picture(128, 192).cuda()).unsqueeze(0)
    fast = model.optimize(compile=False).encoder
    with torch.no_grad():
        model.encoder(x), fast(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.encoder(x), fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_compiler_takes_the_whole_encoder():
    model = redrawn("hrsam_pp_t").cuda()
    x = model.normalise(picture(128, 192).cuda()).unsqueeze(0)
    compiled = torch.compile(model.encoder, fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.encoder(x), rtol=1e-3, atol=1e-3)
