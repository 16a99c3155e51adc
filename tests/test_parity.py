"""SAM's parts against transformers' SamModel, through a checkpoint with Meta's names and `hrsam convert --from sam`."""

import re
from importlib.util import find_spec

import pytest
import torch

from hrsam._compat import import_timm_sam, import_torchvision
from hrsam.models.model import HRSAM, Embedding
from hrsam.models.presets import PRESETS
from hrsam.weights import convert, load

if not all(find_spec(name) for name in ("timm", "torchvision", "transformers")):
    pytest.skip("needs timm, torchvision and transformers", allow_module_level=True)
import_torchvision()  # before transformers, which looks for it
transformers = pytest.importorskip("transformers")

SIDE, WINDOW = 176, 7  # a grid of 11×11 tokens: windows need padding
# transformers' names -> Meta's
NAMES = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"^(image_encoder)\.layers\.", r"\1.blocks."),
    (r"layer_norm(\d)\.", r"norm\1."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.norm2", "neck.3"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (
        r"prompt_encoder\.shared_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"\.layers\.0\.(weight|bias)$", r".layers.1.\1"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random SamModel with a small encoder and a decoder of full size, and the same as our file."""
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "window_size": WINDOW,
            "global_attn_indexes": [1],
            "mlp_dim": 384,
        },
        prompt_encoder_config={"image_size": 1024},
    )
    torch.manual_seed(0)
    theirs = transformers.SamModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # transformers starts from almost zero, which hides mistakes
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.shape[0] == 1 or "rel_pos" in name or "positional" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
    checkpoint = {}
    for name, value in theirs.state_dict().items():
        if not name.startswith("shared_image_embedding."):
            for pattern, meta in NAMES:
                name = re.sub(pattern, meta, name)
            checkpoint[name] = value
    folder = tmp_path_factory.mktemp("sam")
    torch.save(checkpoint, folder / "sam.pth")
    summary = convert(folder / "sam.pth", folder / "sam.safetensors", "sam")
    assert summary["architecture"] == "sam_custom"
    return theirs, load(folder / "sam.safetensors")


def test_image_encoder(pair):
    theirs, ours = pair
    assert ours.config.encoder.global_at == (1,)
    assert (ours.config.encoder.window, ours.config.encoder.image_size) == (WINDOW, SIDE)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        want = theirs.get_image_embeddings(pixels)
        assert (want[0] - want[1]).abs().mean() > 0.1
        torch.testing.assert_close(ours.encoder(pixels), want, atol=1e-4, rtol=1e-4)
        single = ours.encoder.encode([pixels[1]])[0]
    torch.testing.assert_close(single, want[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"takes \(B, 3, {SIDE}, {SIDE}\)"):
        ours.encoder(torch.zeros(1, 3, SIDE, SIDE + 16))
    with pytest.raises(ValueError, match="no images"):
        ours.encoder.encode([])


@pytest.mark.parametrize("prompt", ["clicks and mask", "box", "click and box"])
def test_prompt_encoder_and_decoder(pair, prompt):
    theirs, ours = pair
    torch.manual_seed(1)
    features = torch.randn(1, 256, 64, 64)
    count = {"clicks and mask": 3, "box": 0, "click and box": 1}[prompt]
    points, labels = torch.rand(1, count, 2) * 1023, torch.tensor([[1, 0, 1]])[:, :count]
    box = torch.tensor([[100.0, 220.5, 700.0, 901.0]]) if "box" in prompt else None
    mask = 4 * torch.randn(1, 1, 256, 256) if "mask" in prompt else None
    asked = {
        "image_embeddings": features,
        "input_points": points.unsqueeze(1) if count else None,
        "input_labels": labels.unsqueeze(1) if count else None,
        "input_boxes": None if box is None else box.unsqueeze(1),
        "input_masks": mask,
    }
    with torch.no_grad():
        one, three = (theirs(**asked, multimask_output=several) for several in (False, True))
        embedding = Embedding(features, ours.prompt_encoder.dense_positions((64, 64)))
        got = ours.decode(embedding, points, labels, box, mask, masks=(0, 1, 2, 3))
    logits = torch.cat((one.pred_masks, three.pred_masks), dim=2)[:, 0]
    iou = torch.cat((one.iou_scores, three.iou_scores), dim=2)[:, 0]
    assert logits.std(dim=(2, 3)).min() > 0.1  # constant planes would prove nothing
    torch.testing.assert_close(got.logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.iou, iou, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("preset", "name"),
    [("sam_b", "samvit_base_patch16"), ("sam_l", "samvit_large_patch16"), ("sam_h", "samvit_huge_patch16")],
)
def test_sam_presets_are_timms(preset, name):
    timm_sam = import_timm_sam()
    with torch.device("meta"):
        ours = HRSAM(PRESETS[preset]()).encoder.vit
        theirs = getattr(timm_sam, name)(num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    spans = [[(block.window_size, block.attn.num_heads) for block in vit.blocks] for vit in (ours, theirs)]
    assert spans[0] == spans[1]
