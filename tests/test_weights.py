"""Weight files: round trip, what is refused, names and the manifest."""

import json
import os
import resource
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

import hrsam
from hrsam import weightfile, weights
from hrsam.config import read_settings
from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.presets import PRESETS
from hrsam.models.sam_vit import SamVitConfig
from hrsam.weights import Manifest, WeightsError, load, read_metadata, save

TINY = EncoderConfig(width=64, heads=1, depth=4, scan_at=(1, 3), anchor_side=512)
ABOUT = {"licence": "Apache-2.0", "source": "a test"}


def tiny(decoder=False, seed=0, **changes):
    torch.manual_seed(seed)
    model = HRSAM(ModelConfig("tiny", replace(TINY, **changes), decoder=decoder))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound file, to be damaged."""
    return save(tiny(), tmp_path_factory.mktemp("weights") / "good.safetensors", metadata=ABOUT)


def test_round_trip_in_float32(tmp_path):
    model = tiny(decoder=True)
    path = save(model, tmp_path / "a.safetensors", metadata={**ABOUT, "data": "shapes"})
    back = load(path)
    assert not back.training
    assert back.config == model.config
    state = back.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    metadata = read_metadata(path)
    assert metadata["format_version"] == "1"
    assert metadata["channels"] == "RGB"
    assert metadata["data"] == "shapes"
    assert metadata["preset"] == "tiny"


def test_float16_rounds_matrices_and_keeps_the_rest(tmp_path):
    model = tiny(decoder=True)
    whole = save(model, tmp_path / "whole.safetensors", metadata=ABOUT)
    half = save(model, tmp_path / "half.safetensors", metadata=ABOUT, dtype="float16")
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    stored, back = read_tensors(half), load(half).state_dict()
    for name, value in model.state_dict().items():
        exact = value.ndim < 2 or name.endswith(("gaussian_matrix", ".A_log", ".gamma"))
        assert stored[name].dtype == (torch.float32 if exact else torch.float16), name
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name], value if exact else value.half().float()), name
    assert sum(v.dtype == torch.float16 for v in stored.values()) > 50


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tiny(), tmp_path / "a.safetensors", metadata=ABOUT)
    before = path.read_bytes()
    bad, large = tiny(seed=1), tiny(seed=1)
    bad.encoder.out_norm.bias.data[3] = float("nan")
    large.encoder.blocks[0].attn.qkv.weight.data[0, 0] = 70_000.0
    for model, dtype in ((bad, None), (large, "float16")):
        with pytest.raises(ValueError, match="is not finite"):
            save(model, path, metadata=ABOUT, dtype=dtype)
    assert torch.equal(
        load(save(large, tmp_path / "b.safetensors", metadata=ABOUT)).encoder.blocks[0].attn.qkv.weight,
        large.encoder.blocks[0].attn.qkv.weight,
    )

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tiny(seed=1), path, metadata=ABOUT)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"source": "a test"}}, "'licence' and 'source'"),
        ({"metadata": {**ABOUT, "config": "{}"}}, "without format"),
        ({"metadata": {**ABOUT, "steps": 3}}, "metadata is text"),
        ({"dtype": "bfloat16"}, "got 'bfloat16'"),
        ({"path": "a.pth"}, r"ends in \.safetensors"),
        ({"path": "no/folder/a.safetensors"}, "folder that exists"),
    ],
)
def test_save_refuses(tmp_path, changes, message):
    given = {"path": "a.safetensors", "metadata": ABOUT, **changes}
    with pytest.raises(ValueError, match=message):
        save(tiny(), tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        *(make() for make in PRESETS.values()),
        ModelConfig(
            "x", replace(TINY, mixers=(("window", {"window": 8}),)), mean=(1.0, 2.0, 3.0), bgr=True, decoder=False
        ),
        ModelConfig("y", SamVitConfig(96, 3, 3, (1,), 7, 256)),
    ],
    ids=lambda config: config.preset,
)
def test_configuration_survives_json(config):
    assert weightfile.config_from_json(weightfile.config_to_json(config)) == config


def rewritten(good, path, change=None, tensors=None, **metadata):
    """``good`` with its header or tensors changed, as safetensors writes it."""
    state = read_tensors(good)
    if change is not None:
        change(state)
    save_file(state if tensors is None else tensors, path, {**read_metadata(good), **metadata})
    return path


def raw(path, header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def refused(path, message, seconds=2.0, megabytes=200):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(WeightsError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2500
    assert time.perf_counter() - started < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def test_truncated_at_twenty_places(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.safetensors"
    for place in range(20):
        path.write_bytes(whole[: len(whole) * place // 20])
        refused(path, "not a sound safetensors file|not a safetensors file")
    path.write_bytes(whole + b"more")
    refused(path, "not a sound safetensors file")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"PK\x03\x04" + bytes(64), "is a pickle.*hrsam convert"),
        (b"\x80\x02}q\x00." + bytes(64), "is a pickle.*hrsam convert"),
        (struct.pack("<Q", 2) + b"{}", "no hrsam metadata"),
        (struct.pack("<Q", 2) + b"[]", "not a sound safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not a sound safetensors file"),
    ],
)
def test_not_our_files(tmp_path, start, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    refused(path, message)


def test_headers_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(raw(path, b"{}" + b" " * weightfile.MAX_HEADER), "cut off in its header")
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for lie in (
        {"a": {**entry, "data_offsets": [0, 2**40]}},
        {"a": {**entry, "data_offsets": [16, 0]}},
        {"a": {**entry, "shape": [2**62, 2**62]}},
        {"a": {**entry, "shape": [5]}},
        {"a": entry, "b": entry},
        {"a": {**entry, "dtype": "F7"}},
        {"a": {**entry, "data_offsets": [-1, 15]}},
    ):
        refused(raw(path, lie, bytes(16)), "not a sound safetensors file")


def test_metadata_is_checked(good, tmp_path):
    path = tmp_path / "x.safetensors"
    refused(rewritten(good, path, format="pt"), "no hrsam metadata")
    refused(rewritten(good, path, format_version="2"), "version '2'.*newer")
    save_file(read_tensors(good), path)
    refused(path, "no hrsam metadata")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "", "not readable"),
        (lambda c: "[" * 100_000, "not readable"),
        (lambda c: "[]", "not readable"),
        (lambda c: {**c, "encoder": {**c["encoder"], "kind": "os.system"}}, "not readable"),
        (lambda c: {**c, "surprise": 1}, "'surprise'"),
        (lambda c: {**c, "encoder": {**c["encoder"], "layers": 1}}, "'layers'"),
        (lambda c: {**c, "encoder": {**c["encoder"], "width": "64"}}, "wrong at width"),
        (lambda c: {**c, "encoder": {**c["encoder"], "width": 10**12}}, "width is 1000000000000"),
        (lambda c: {**c, "encoder": {**c["encoder"], "width": 65536}}, "does not fit"),
        (lambda c: {**c, "encoder": {**c["encoder"], "depth": 10**9}}, "depth is"),
        (lambda c: {**c, "encoder": {**c["encoder"], "heads": 0}}, "heads is 0"),
        (lambda c: {**c, "encoder": {**c["encoder"], "heads": 7}}, "not a multiple of heads"),
        (lambda c: {**c, "encoder": {**c["encoder"], "scan_at": [1, 9]}}, "below the depth"),
        (lambda c: {**c, "encoder": {**c["encoder"], "scan_at": []}}, "scan_at"),
        (lambda c: {**c, "encoder": {**c["encoder"], "mixers": [["subprocess", {}]]}}, "no mixer 'subprocess'"),
        (lambda c: {**c, "mean": [1.0]}, "wrong at mean"),
        (lambda c: {**c, "decoder": True}, "137 missing.*prompt encoder or mask decoder are not there"),
        (lambda c: {**c, "encoder": {**c["encoder"], "anchor_side": None}}, "surplus.*HRSAM.. weights"),
    ],
)
def test_configuration_is_checked(good, tmp_path, change, message):
    text = change(json.loads(read_metadata(good)["config"]))
    text = text if isinstance(text, str) else json.dumps(text)
    refused(rewritten(good, tmp_path / "x.safetensors", config=text), message)


def put(name, value):
    return lambda state: state.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["encoder.out_norm.bias"].__setitem__(0, float("nan")), "out_norm.bias holds NaN or infinity"),
        (lambda s: s["encoder.pos_embed"].__setitem__((0, 0, 0), float("inf")), "pos_embed holds NaN or infinity"),
        (lambda s: s.pop("encoder.pos_embed"), r"1 missing \(encoder.pos_embed\): the file is incomplete"),
        (put("extra", torch.zeros(1)), r"1 surplus \(extra\)"),
        (put("encoder.out_norm.bias", torch.zeros(1, 256)), r"out_norm.bias \(1, 256\) instead of \(256,\)"),
        (put("encoder.out_norm.bias", torch.zeros(256).bfloat16()), "stored as BF16"),
        (put("encoder.out_norm.bias", torch.zeros(256).double()), "stored as F64"),
        (put("encoder.out_norm.bias", torch.zeros(256).long()), "stored as I64"),
        (lambda s: s.clear(), r"missing \((encoder\.\S+, ){10}…\)"),
    ],
)
def test_tensors_are_checked(good, tmp_path, change, message):
    refused(rewritten(good, tmp_path / "x.safetensors", change), message)


@pytest.fixture
def shelf(good, tmp_path, monkeypatch):
    """A folder with one trained model, ``hrsam_t.test``; returns a function that rewrites its manifest."""
    monkeypatch.setenv("HRSAM_WEIGHTS", str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(good.read_bytes())
    entry = {
        "name": "hrsam_t.test",
        "preset": "hrsam_t",
        "file": "a.safetensors",
        "sha256": weightfile.sha256(good),
        "bytes": good.stat().st_size,
        "licence": "Apache-2.0",
        "data": "shapes",
        "protocol": "none",
        "numbers": {"noc90": 3.5},
    }

    def write(**changes):
        (tmp_path / "manifest.yaml").write_text(yaml.safe_dump({"models": [{**entry, **changes}]}))

    write()
    return write


def test_load_by_tag(shelf, good):
    assert "hrsam_t.test" in hrsam.list_models()
    assert set(PRESETS) <= set(hrsam.list_models())
    assert any("hrsam_t.test" in line and "shapes" in line for line in weights.describe_models())
    assert torch.equal(hrsam.load("hrsam_t.test").encoder.pos_embed, load(good).encoder.pos_embed)


def test_names_that_are_not_there(shelf):
    with pytest.raises(ValueError, match=r"hrsam_t is an architecture; trained weights: hrsam_t\.test"):
        load("hrsam_t")
    with pytest.raises(ValueError, match=r"hrsam_b is an architecture; no trained weights"):
        load("hrsam_b")
    with pytest.raises(ValueError, match=r"no trained model 'hrsam_t.tset'; did you mean 'hrsam_t.test'\?"):
        load("hrsam_t.tset")
    with pytest.raises(WeightsError, match="there is no weight file"):
        load("nowhere.safetensors")
    with pytest.raises(ValueError, match=r"no architecture 'hrsam_pp_x'; did you mean 'hrsam_pp_"):
        hrsam.build("hrsam_pp_x")


def test_listed_file_must_be_the_listed_one(shelf, tmp_path):
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(WeightsError, match="SHA-256"):
        load("hrsam_t.test")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(WeightsError, match="is missing"):
        load("hrsam_t.test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../a.safetensors"}, "models.0.file"),
        ({"file": "/etc/passwd"}, "models.0.file"),
        ({"sha256": "0" * 63}, "models.0.sha256"),
        ({"name": "hrsam_b.test"}, "existing preset"),
        ({"preset": "vit", "name": "vit.test"}, "existing preset"),
        ({"licens": "MIT"}, "did you mean 'licence'"),
    ],
)
def test_manifest_is_strict(shelf, change, message):
    shelf(**change)
    with pytest.raises(ValueError, match=message):
        load("hrsam_t.test")


def test_weights_folder_must_have_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HRSAM_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=r"no manifest\.yaml"):
        hrsam.list_models()


def test_shipped_manifest():
    folder = Path(hrsam.__file__).parents[1] / "weights"
    for entry in read_settings(Manifest, folder / "manifest.yaml").models:
        assert (folder / entry.file).stat().st_size == entry.bytes <= 30 * 10**6
        assert weightfile.sha256(folder / entry.file) == entry.sha256
        assert load(entry.name).config.preset == entry.preset
