"""Converters: every name of the authors', Meta's and MAE's files, and pickles that are damaged or hostile."""

import functools
import math
import operator
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hrsam import weightfile, weights
from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.presets import PRESETS
from hrsam.weights import WeightsError, convert, load, read_metadata

TINY = EncoderConfig(width=64, heads=1, depth=4, scan_at=(1, 3), anchor_side=512)

SCAN = [
    ("in_norm.{p}", "norm_in.{p}", ("C",)),
    ("out_norm.{p}", "norm_out.{p}", ("C",)),
    ("in_proj.0.{p}", "in_proj.{p}", ("2C", "C")),
    ("ssm_proj.{p}", "param_proj.{p}", ("C+2N", "C")),
    ("ssm_proj_bias", "dt_bias", ("C",)),
    ("Ds", "D", ("C",)),
    ("As_log", "A_log", ("C", "N")),
    ("gamma", "gamma", ("C", "R", 1)),
    ("out_proj.{p}", "out_proj.{p}", ("C", "C")),
]
ENCODER = [
    ("pos_embed", "pos_embed", (1, 197, "C")),
    ("patch_embed.proj.{p}", "patch_embed.{p}", ("C", 3, 16, 16)),
    ("rope.freqs", None, (16,)),
    *((f"blocks.{{i}}.{n}.{{p}}", f"blocks.{{i}}.{n}.{{p}}", ("C",)) for n in ("norm1", "norm2")),
    ("blocks.{i}.attn.padding", "blocks.{i}.attn.padding", (1, "C")),
    ("blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.qkv.{p}", ("3C", "C")),
    ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attn.proj.{p}", ("C", "C")),
    ("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}", ("4C", "C")),
    ("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.fc2.{p}", ("C", "4C")),
    ("lateral_convs.{j}.0.weight", "laterals.{j}.0.weight", (256, "L")),
    ("lateral_convs.{j}.1.{p}", "laterals.{j}.1.{p}", (256,)),
    ("out_conv.0.weight", "out_conv.weight", (256, 1, 3, 3)),
    ("out_conv.2.{p}", "out_norm.{p}", (256,)),
]
HRSAM_SCANS = [(f"mamba_blocks.{{j}}.{a}", f"scans.{{j}}.{b}", s) for a, b, s in SCAN]
HRSAM_PP_SCANS = [
    *((f"ss_mamba_blocks.{{j}}.{a}", f"scans.{{j}}.{b}", s) for a, b, s in SCAN),
    *((f"ms_mamba_blocks.{{j}}.{a}", f"scans_across.{{j}}.{b}", s) for a, b, s in SCAN),
    ("multi_scale_fusion.{j}.0.{p}", "fusion_norms.{j}.{p}", ("C",)),
]


def reference_names(config):
    """The authors' file for an architecture, written down apart from our modules: name -> (our name or None, shape)."""
    encoder, across = config.encoder, config.encoder.anchor_side is not None
    c, n = encoder.width, encoder.state
    sizes = {"C": c, "2C": 2 * c, "3C": 3 * c, "4C": 4 * c, "N": n, "C+2N": c + 2 * n, "R": encoder.cycles}
    sizes["L"] = 2 * c if across else c
    names = {}
    for theirs, ours, shape in ENCODER + (HRSAM_PP_SCANS if across else HRSAM_SCANS):
        shape = tuple(sizes.get(side, side) for side in shape)
        for i in range(encoder.depth) if "{i}" in theirs else [0]:
            for j in range(len(encoder.scan_at)) if "{j}" in theirs else [0]:
                for p in ("weight", "bias") if "{p}" in theirs else [""]:
                    found = None if ours is None else "encoder." + ours.format(i=i, j=j, p=p)
                    names["backbone." + theirs.format(i=i, j=j, p=p)] = (found, shape[:1] if p == "bias" else shape)
    return names


def decoder_names(prefixes):
    """Names and shapes of Meta's prompt encoder and mask decoder, with the given prefix and part names."""
    neck, head, layer, points = prefixes
    with torch.device("meta"):
        model = HRSAM(ModelConfig("tiny", TINY))
    names = {}
    for name, value in model.state_dict().items():
        if not name.startswith("encoder."):
            theirs = name.replace("prompt_encoder.", neck).replace("mask_decoder.", head)
            names[theirs.replace("pe_layer", layer).replace("point_embeddings", points)] = (name, tuple(value.shape))
    return names


AUTHORS = ("neck.", "decode_head.", "pos_embed_layer", "point_embeds")
META = ("prompt_encoder.", "mask_decoder.", "pe_layer", "point_embeddings")


def draw(names, seed=0):
    torch.manual_seed(seed)
    state = {name: torch.randn(shape) for name, (_, shape) in names.items()}
    if "backbone.rope.freqs" in state:
        state["backbone.rope.freqs"] = torch.tensor([10_000 ** (-2 * i / 32) for i in range(16)])
    return state


@functools.cache
def authors(across=True, decoder=False):
    names = reference_names(ModelConfig("tiny", replace(TINY, anchor_side=512 if across else None)))
    names = {**names, **(decoder_names(AUTHORS) if decoder else {})}
    return names, draw(names)


def pickled(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("preset", "entries"), [("hrsam_b", 231), ("hrsam_pp_b", 295)])
def test_every_name_of_the_full_size(preset, entries):
    names = reference_names(PRESETS[preset]())
    assert len(names) == entries
    decoder = decoder_names(AUTHORS)
    assert sum(name.startswith("neck.") for name in decoder) == 17
    assert sum(name.startswith("decode_head.") for name in decoder) == 120
    assert len(names | decoder) == {231: 368, 295: 432}[entries]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, (_, shape) in (names | decoder).items() if "freqs" not in name}
        ours = HRSAM(PRESETS[preset]()).state_dict()
    config, renamed = weights._from_hrsam(state, Path("x.pth"))
    assert config == PRESETS[preset]()
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("across", [False, True])
def test_authors_weights(tmp_path, across):
    names, state = authors(across, decoder=True)
    source, target = pickled(state, tmp_path / "x.pth"), tmp_path / "x.safetensors"
    summary = convert(source, target, "hrsam")
    model = load(target)
    assert model.config.bgr
    assert model.config.encoder == replace(TINY, anchor_side=512 if across else None)
    assert summary["channels"] == "BGR"
    assert summary["sha256"] == weightfile.sha256(target)
    assert read_metadata(target)["source_sha256"] == weightfile.sha256(source)
    assert "no licence" in read_metadata(target)["licence"]
    ours = model.state_dict()
    assert len(ours) == len(names) - 1
    for theirs, (name, _) in names.items():
        if name is not None:
            value = state[theirs]
            assert torch.equal(ours[name], value[..., 0] if theirs.endswith("gamma") else value), theirs


@pytest.mark.parametrize("wrap", [{"state_dict": ()}, {"model": ()}, {"state_dict": (), "meta": {"epoch": 3}}])
def test_wrappers(tmp_path, wrap):
    _, state = authors()
    inner = {f"module.{name}": value for name, value in state.items()}
    wrap = {key: inner if value == () else value for key, value in wrap.items()}
    summary = convert(
        pickled(wrap, tmp_path / "x.pth"),
        tmp_path / "x.safetensors",
        "hrsam",
        encoder_only=True,
        bgr=False,
        licence="MIT",
    )
    model = load(tmp_path / "x.safetensors")
    assert not model.config.decoder
    assert not model.config.bgr
    assert summary["licence"] == read_metadata(tmp_path / "x.safetensors")["licence"] == "MIT"
    assert torch.equal(model.encoder.pos_embed, state["backbone.pos_embed"])


def test_safetensors_source_and_encoder_only(tmp_path):
    _, state = authors(decoder=True)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="the source itself"):
        convert(tmp_path / "x.safetensors", tmp_path / "x.safetensors", "hrsam")
    summary = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "hrsam", encoder_only=True)
    assert summary["ignored"] == "mask_decoder, prompt_encoder"
    assert not hasattr(load(tmp_path / "y.safetensors"), "mask_decoder")


def mae(config, extra=()):
    names = reference_names(config)
    kept = {}
    for name, entry in names.items():
        name = name.removeprefix("backbone.")
        if re.match(r"pos_embed|patch_embed|blocks", name) and not name.endswith("padding"):
            kept[name] = entry
    kept |= {"cls_token": (None, (1, 1, 64)), "norm.weight": (None, (64,)), "norm.bias": (None, (64,))}
    return kept, draw(kept | dict.fromkeys(extra, (None, (3,))))


def test_mae_weights(tmp_path, monkeypatch):
    config = ModelConfig("hrsam_pp_tiny", TINY)
    monkeypatch.setitem(PRESETS, "hrsam_pp_tiny", lambda: config)
    names, state = mae(config, ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"))
    source = pickled({"model": state}, tmp_path / "mae.pth")
    sam = decoder_names(META)
    sam_state = draw({**sam, "image_encoder.pos_embed": (None, (1, 4, 4, 8))}, seed=1)
    target = tmp_path / "a.safetensors"
    with pytest.raises(WeightsError, match="--encoder-only or --decoder-from"):
        convert(source, target, "mae", preset="hrsam_pp_tiny")
    with pytest.raises(ValueError, match="MAE weights can start one of"):
        convert(source, target, "mae", encoder_only=True)
    assert not target.exists()
    torch.manual_seed(17)
    random_state = torch.random.get_rng_state()
    summary = convert(
        source, target, "mae", preset="hrsam_pp_tiny", decoder_from=pickled(sam_state, tmp_path / "sam.pth")
    )
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert summary["ignored"] == "cls_token, decoder_blocks, decoder_embed, mask_token, norm"
    model = load(target)
    assert model.config == config
    ours = model.state_dict()
    given = {name: state[key] for key, (name, _) in names.items() if name is not None}
    given |= {name: sam_state[key] for key, (name, _) in sam.items()}
    for name, value in given.items():
        assert torch.equal(ours[name], value), name
    fresh = ours.keys() - given.keys()
    assert summary["drawn_afresh"] == f"{len(fresh)} tensors, seed 0"
    assert {name.split(".")[1] for name in fresh} == {
        "blocks", "fusion_norms", "laterals", "out_conv", "out_norm", "scans", "scans_across",
    }  # fmt: skip
    assert not ours["encoder.blocks.0.attn.padding"].any()
    torch.manual_seed(18)
    convert(source, tmp_path / "b.safetensors", "mae", preset="hrsam_pp_tiny", encoder_only=True)
    again = load(tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(again[name], ours[name]) for name in again)


def changed(**changes):
    _, state = authors()
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: changed(), "give --encoder-only"),
        (lambda: changed(**{"backbone.rope.freqs": torch.ones(16)}), "other positions"),
        (lambda: changed(**{"backbone.rope.freqs": torch.ones(3)}), "other positions"),
        (lambda: changed(**{"backbone.out_conv.2.bias": None}), r"1 missing \(encoder.out_norm.bias\)"),
        (lambda: changed(**{"backbone.more": torch.ones(3)}), r"1 surplus \(encoder.more\)"),
        (
            lambda: changed(**{"backbone.pos_embed": torch.ones(1, 196, 64)}),
            r"\(1, 196, 64\) instead of \(1, 197, 64\)",
        ),
        (lambda: changed(**{"backbone.out_conv.2.bias": torch.full((256,), math.nan)}), "NaN or infinity"),
        (lambda: changed(**{"backbone.mamba_blocks.0.Ds": torch.ones(64)}), "two tensors for encoder.scans.0.D"),
        (lambda: changed(**{"backbone.pos_embed": torch.ones(1).expand(1, 197, 2**40)}), "instead of"),
        (lambda: changed(**{"backbone.patch_embed.proj.weight": torch.ones(1).expand(2**40, 3, 16, 16)}), "width is"),
        (lambda: changed(**{"backbone.patch_embed.proj.weight": torch.ones(())}), "no proper tensor"),
        (lambda: changed(epoch=3), "'epoch' is not a floating-point tensor but int"),
        (lambda: changed(step=torch.tensor(3)), "'step' is not a floating-point tensor but torch.int64"),
        (lambda: {**changed(), 5: torch.ones(1)}, "5 is not"),
        (lambda: changed(dust=torch.eye(2).to_sparse()), "'dust' is not"),
        (lambda: mae(ModelConfig("tiny", TINY))[1], "look like --from mae"),
        (lambda: {"image_encoder.pos_embed": torch.ones(1)}, "look like --from sam"),
        (lambda: {"weights": torch.ones(1)}, "of no kind we know"),
        (lambda: [1, 2], "holds no weights by name but a list"),
        (lambda: {}, "holds no weights by name"),
    ],
)
def test_converter_refuses(tmp_path, state, message):
    source = pickled(state(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / "x.safetensors", "hrsam", encoder_only="encoder-only" not in message)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"origin": "hrsma"}, "did you mean 'hrsam'"),
        ({"origin": "sam", "preset": "sam_b"}, "for MAE weights"),
        ({"origin": "mae", "encoder_only": True, "decoder_from": "x.pth"}, "not both"),
        ({"origin": "hrsam", "source": "nowhere.pth"}, "there is no weight file"),
        ({"origin": "hrsam", "target": "x.pth"}, r"ends in \.safetensors"),
    ],
)
def test_converter_arguments(tmp_path, arguments, message):
    source = tmp_path / arguments.pop("source", "x.pth")
    pickled({"a": torch.ones(1)}, tmp_path / "x.pth")
    target = tmp_path / arguments.pop("target", "y.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(source, target, **arguments)


def test_truncated_pickles(tmp_path):
    state = {name: value for name, value in authors()[1].items() if "blocks" not in name}
    whole = pickled(state, tmp_path / "x.pth").read_bytes()
    for place in range(20):
        (tmp_path / "x.pth").write_bytes(whole[: len(whole) * place // 20])
        with pytest.raises(WeightsError, match="could not be read as a pickle of tensors"):
            convert(tmp_path / "x.pth", tmp_path / "x.safetensors", "hrsam")
    assert not (tmp_path / "x.safetensors").exists()


class Gadget:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


GADGETS = {
    "os.system": lambda trap: Gadget(os.system, f"touch {trap}"),
    "os.mkdir": lambda trap: Gadget(os.mkdir, trap),
    "subprocess": lambda trap: Gadget(subprocess.check_output, ["touch", trap]),
    "eval": lambda trap: Gadget(eval, f"open({trap!r}, 'w').close()"),
    "exec": lambda trap: Gadget(exec, f"open({trap!r}, 'w').close()"),
    "copy": lambda trap: Gadget(shutil.copyfile, __file__, trap),
    "partial": lambda trap: Gadget(functools.partial(os.mkdir, trap)),
    "methodcaller": lambda trap: Gadget(operator.methodcaller("touch"), Path(trap)),
    "getattr": lambda trap: Gadget(Path(trap).touch),
    "torch.save": lambda trap: Gadget(torch.save, {}, trap),
    "runpy": lambda trap: Gadget(runpy.run_path, f"{trap}.py"),
    "pickle.loads": lambda trap: Gadget(pickle.loads, pickle.dumps(Gadget(os.mkdir, trap))),
}


@pytest.mark.parametrize("kind", GADGETS)
def test_no_code_of_a_pickle_runs(tmp_path, kind):
    trap, source = tmp_path / "sprung", tmp_path / "x.pth"
    (tmp_path / "sprung.py").write_text(f"open({str(trap)!r}, 'w').close()")
    payload = {"backbone.pos_embed": torch.ones(2), "more": GADGETS[kind](str(trap))}
    pickle.loads(pickle.dumps(payload["more"]))
    assert trap.exists()  # the trap works where pickles are trusted
    trap.rmdir() if trap.is_dir() else trap.unlink()
    for write in (
        lambda: torch.save(payload, source),
        lambda: source.write_bytes(pickle.dumps(payload["more"], protocol=2)),
    ):
        write()
        for origin in ("hrsam", "sam", "mae"):
            with pytest.raises(WeightsError, match="could not be read as a pickle of tensors"):
                convert(source, tmp_path / "x.safetensors", origin, encoder_only=True)
        shutil.copyfile(source, tmp_path / "y.safetensors")
        with pytest.raises(WeightsError, match="is a pickle"):
            load(tmp_path / "y.safetensors")
        (tmp_path / "y.safetensors").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sprung.py", "x.pth"]


@pytest.mark.parametrize("places", [1, -1])
def test_archives_that_lie(tmp_path, places):
    """The pickle claims more numbers than the archive holds (of the storage, or of storage and tensor)."""
    source = pickled({"backbone.pos_embed": torch.arange(7.0)}, tmp_path / "x.pth")
    with zipfile.ZipFile(source) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    name = next(part for part in parts if part.endswith("data.pkl"))
    assert parts[name].count(b"K\x07") == 2  # seven, as a storage's and as a tensor's size
    parts[name] = parts[name].replace(b"K\x07", b"J" + struct.pack("<i", 10**6), places)
    for compression, message in ((zipfile.ZIP_STORED, "could not be read"), (zipfile.ZIP_DEFLATED, "unpacks to more")):
        with zipfile.ZipFile(source, "w", compression) as archive:
            for part, content in parts.items():
                archive.writestr(part, content)
            if compression == zipfile.ZIP_DEFLATED:
                archive.writestr("x/data/1", bytes(10**6))
        with pytest.raises(WeightsError, match=message):
            convert(source, tmp_path / "x.safetensors", "hrsam", encoder_only=True)


def test_old_torch_reads_no_pickles(tmp_path, monkeypatch, caplog):
    source = pickled(authors()[1], tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(ValueError, match="CVE-2025-32434"):
        convert(source, tmp_path / "x.safetensors", "hrsam", encoder_only=True)
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    convert(source, tmp_path / "x.safetensors", "hrsam", encoder_only=True)
    assert "CVE-2026-24747" in caplog.text
