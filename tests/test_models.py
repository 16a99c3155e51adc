"""Encoder wiring, decoder, packed calls."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrsam.layout import Layout
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.models.model import HRSAM
from hrsam.models.presets import PRESETS
from hrsam.models.prompt import PromptEncoder
from tests.builders import SMALL, identity_scans, small_model


@pytest.mark.parametrize(
    ("preset", "encoder", "entries"), [("hrsam_b", 96_369_152, 230), ("hrsam_pp_b", 106_934_016, 294)]
)
def test_sizes_of_the_paper(preset, encoder, entries):
    with torch.device("meta"):
        model = HRSAM(PRESETS[preset]())
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert len(model.encoder.state_dict()) == entries  # the authors' file holds one more: constant rotary frequencies
    assert sum(p.numel() for p in model.prompt_encoder.parameters()) == 6_220
    assert sum(p.numel() for p in model.mask_decoder.parameters()) == 4_058_340
    assert len(model.prompt_encoder.state_dict()) == 17
    assert len(model.mask_decoder.state_dict()) == 120


@pytest.mark.parametrize("anchor_side", [None, 64])
@pytest.mark.parametrize("size", [(16, 16), (48, 160), (272, 64)])
def test_any_size(size, anchor_side):
    model = small_model(anchor_side)
    with torch.no_grad():
        out = model.encoder(torch.randn(2, 3, *size))
    assert out.shape == (2, 256, size[0] // 16, size[1] // 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("anchor_side", [None, 64])
def test_packed_equals_single_bit_for_bit(anchor_side):
    model = small_model(anchor_side)
    images = [torch.rand(3, *size) for size in ((100, 70), (64, 64), (33, 200), (100, 70))]
    packed = model.encode(images)
    for image, embedding in zip(images, packed):
        assert torch.equal(model.encode([image])[0].features, embedding.features)
    changed = model.encode([images[0], torch.rand(3, 64, 64), images[2]])
    assert torch.equal(changed[0].features, packed[0].features)
    assert torch.equal(changed[2].features, packed[2].features)
    order = [2, 0, 3, 1]
    for index, embedding in zip(order, model.encode([images[i] for i in order])):
        assert torch.equal(embedding.features, packed[index].features)


def test_list_form_equals_tensor_form():
    model = small_model()
    image = torch.rand(3, 80, 96)
    pixels = model.normalise(image).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.encoder(pixels), model.encode([image])[0].features)


def test_padding_is_the_mean_colour():
    model = small_model()
    image = torch.rand(3, 70, 90)
    mean = torch.tensor(model.config.mean).view(3, 1, 1) / 255
    padded = mean.expand(3, 80, 96).clone()
    padded[:, :70, :90] = image
    torch.testing.assert_close(model.encode([image])[0].features, model.encode([padded])[0].features, atol=1e-5, rtol=0)


def test_bgr_swaps_channels_before_normalising():
    model = small_model()
    image = torch.rand(3, 16, 16)
    straight = model.normalise(image.flip(0))
    model.config = replace(model.config, bgr=True)
    assert torch.equal(model.normalise(image), straight)


def test_class_slot_of_positions_has_no_influence():
    model = small_model()
    pixels = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        before = model.encoder(pixels)
        model.encoder.pos_embed[:, 0] += 1.0
        assert torch.equal(model.encoder(pixels), before)
        model.encoder.pos_embed[:, 1:] += torch.randn_like(model.encoder.pos_embed[:, 1:])
        assert not torch.equal(model.encoder(pixels), before)


def test_positions_are_used_as_they_are_at_the_pretrained_grid():
    encoder = small_model().encoder
    assert torch.equal(encoder._positions((14, 14)), encoder.pos_embed[0, 1:])


def test_anchor_of_equal_size_is_the_image_itself():
    """With the input at the anchor's size and identity scans both scales carry the same tokens."""
    model = small_model(anchor_side=64)
    identity_scans(model.encoder)
    pixels = torch.randn(1, 3, 64, 64)
    tokens, layout = model.encoder._embed(pixels)
    assert layout.grids == ((4, 4), (4, 4))
    assert torch.equal(tokens[:16], tokens[16:])
    for block in model.encoder.blocks:
        tokens = block(tokens, layout)
    torch.testing.assert_close(tokens[:16], tokens[16:])


def test_anchor_reaches_the_output_only_through_lateral_and_scan():
    model = small_model(anchor_side=64)
    identity_scans(model.encoder)
    with torch.no_grad():
        for lateral in model.encoder.laterals:
            lateral[0].weight[:, model.config.encoder.width :] = 0
        pixels = torch.randn(1, 3, 96, 64)
        tokens, layout = model.encoder._embed(pixels)
        changed = tokens.clone()
        changed[24:] += 1
        a, b = model.encoder._stages(tokens, layout)[0], model.encoder._stages(changed, layout)[0]
    torch.testing.assert_close(a, b)


def test_order_of_scales_in_the_scan_across_matters():
    """The scan across starts with the picture's own grid, so the anchor map standing first gives other values."""
    scan = small_model(anchor_side=64).encoder.scans_across[0]
    nn.init.normal_(scan.in_proj.weight)
    nn.init.normal_(scan.out_proj.weight)
    nn.init.zeros_(scan.dt_bias)
    picture, anchor = torch.randn(24, 64), torch.randn(16, 64)
    straight, swapped = Layout(((6, 4), (4, 4)), (0, 0)), Layout(((4, 4), (6, 4)), (0, 0))

    def both_ways(across):
        with torch.no_grad():
            first = scan(torch.cat((picture, anchor)), straight, across=across)[:24]
            last = scan(torch.cat((anchor, picture)), swapped, across=across)[16:]
        return (first - last).abs().max()

    assert both_ways(across=True) > 0.1
    assert both_ways(across=False) == 0


def test_content_shift_moves_the_map():
    """Without positions, scans and shifted windows, moving the picture by a window moves the map by a window."""
    model = small_model(anchor_side=None, mixers=(("window", {"window": 4, "shift": 0}),))
    identity_scans(model.encoder)
    nn.init.zeros_(model.encoder.pos_embed)
    model.encoder.out_conv.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        a = model.encoder(pixels)
        b = model.encoder(pixels.roll((64, 64), (2, 3)))
    torch.testing.assert_close(a.roll((4, 4), (2, 3)), b, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_drops_whole_images():
    model = small_model(drop_path=0.9).train()
    _, layout = model.encoder._embed(torch.randn(8, 3, 64, 64))
    first, second = model.encoder._keep(3, layout, torch.zeros(1))
    for keep in (first, second):
        per_image = keep.view(8, -1)
        assert (per_image == per_image[:, :1]).all()
        torch.testing.assert_close(per_image.unique(), torch.tensor([0.0, 10.0]))
    assert model.eval().encoder._keep(3, layout, torch.zeros(1)) is None


def test_dense_positions_are_resized_not_recomputed():
    prompt = PromptEncoder()
    axis = (torch.arange(128) + 0.5) / 128
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    direct = prompt.pe_layer(torch.stack((x, y), dim=-1)).permute(2, 0, 1).unsqueeze(0)
    nominal = prompt.dense_positions((64, 64))
    assert torch.equal(prompt.dense_positions((128, 128)), F.interpolate(nominal, (128, 128), mode="bilinear"))
    assert (prompt.dense_positions((128, 128)) - direct).abs().max() > 0.01


def test_decode_shapes_and_errors():
    model = small_model()
    embedding = model.encode([torch.rand(3, 80, 112)])[0]
    assert embedding.size == (80, 112)
    points, labels = torch.tensor([[[3.0, 5.0], [60.0, 70.0]]]), torch.tensor([[1, 0]])
    out = model.decode(embedding, points, labels)
    assert out.logits.shape == (1, 1, 20, 28)
    assert out.iou.shape == (1, 1)
    every = model.decode(embedding, points, labels, masks=(0, 1, 2, 3))
    assert every.logits.shape == (1, 4, 20, 28)
    torch.testing.assert_close(every.logits[:, :1], out.logits)
    boxed = model.decode(embedding, points[:, :0], labels[:, :0], box=torch.tensor([[1.0, 2.0, 50.0, 60.0]]))
    assert boxed.logits.shape == (1, 1, 20, 28)
    again = model.decode(embedding, points, labels, previous=out.logits)
    assert not torch.equal(again.logits, out.logits)
    with pytest.raises(ValueError, match="empty prompt"):
        model.decode(embedding, points[:, :0], labels[:, :0])
    with pytest.raises(ValueError, match=r"points are \(B, P, 2\)"):
        model.decode(embedding, points[0], labels)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encoder(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="no images"):
        model.encoder.encode([])
    with pytest.raises(ValueError, match="no mixer 'windows'"):
        Encoder(EncoderConfig(**{**SMALL, "mixers": (("windows", {}),)}))


def test_upscaling_equals_transposed_convolutions():
    decoder = small_model().mask_decoder
    source = torch.randn(1, 6 * 5, 256)
    got = decoder._upscale(source).unflatten(1, (6, 5)).unflatten(3, (2, 2)).unflatten(5, (2, 2))
    got = got.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(1, 32, 24, 20)
    want = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (6, 5)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_packed_equals_single_where_matrix_products_change_their_kernel():
    """A picture of one token beside large ones: libraries sum in another order for one row than for many."""
    model = small_model(64, width=384, heads=6, depth=2, scan_at=(1,))
    images = [torch.rand(3, *size) for size in ((16, 16), (400, 528), (333, 77), (16, 16))]
    for image, embedding in zip(images, model.encode(images)):
        assert torch.equal(model.encode([image])[0].features, embedding.features)
