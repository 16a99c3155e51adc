"""Trained models by name, and foreign weights turned into ours.

At run time only safetensors are read; pickles (``.pth``) are read by :func:`convert` alone, with ``weights_only=True``.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hrsam.config import Settings, read_settings
from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.presets import ANCHOR_SIDE, PRESETS, build, suggest
from hrsam.models.sam_vit import PATCH, SamVitConfig
from hrsam.weightfile import (
    DECODER,
    WeightsError,
    assemble,
    check_target,
    load_file,
    open_file,
    read_metadata,
    save,
    sha256,
)

__all__ = ["WeightsError", "build", "convert", "describe_models", "list_models", "load", "read_metadata", "save"]


def load(name_or_path: str | Path, device: str | torch.device = "cpu") -> HRSAM:
    """A trained model in eval mode with float32 weights, by tag (``hrsam_pp_t.starter``) or ``.safetensors`` file.

    A tag is looked up in the manifests, and its file's SHA-256 is checked.  Raises ``ValueError`` for an unknown name,
    and its subclass :class:`WeightsError` for a bad file.
    """
    return load_file(locate(name_or_path)).to(device)


def locate(name_or_path: str | Path) -> Path:
    """The weight file that :func:`load` reads, a listed one's SHA-256 checked; errors as there."""
    name = str(name_or_path)
    path = Path(name)
    if isinstance(name_or_path, Path) or path.name != name or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return path
    listed = _listed()
    if name in PRESETS:
        tags = [tag for tag, (_, entry) in listed.items() if entry.preset == name]
        found = (
            f"trained weights: {', '.join(tags)}"
            if tags
            else f"no trained weights of it are listed; give a file, or hrsam.build({name!r}) for random weights"
        )
        raise ValueError(f"{name} is an architecture; {found}")
    if name not in listed:
        raise ValueError(f"there is no trained model {name!r}; {suggest(name, listed) if listed else 'none is listed'}")
    folder, entry = listed[name]
    path = folder / entry.file
    if not path.is_file():
        raise WeightsError(f"{folder / 'manifest.yaml'} lists {name}, but its file {path} is missing")
    if (found := sha256(path)) != entry.sha256:
        raise WeightsError(f"{path} is damaged or not the listed file: SHA-256 {found}, manifest says {entry.sha256}")
    return path


class ManifestEntry(Settings):
    """One trained model.  ``name``: preset and training, ``hrsam_pp_t.starter``; ``file`` lies beside the manifest."""

    name: str = Field(pattern=r"^[a-z0-9_]+\.[a-z0-9_.-]+$")
    preset: str
    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0)
    licence: str
    data: str
    protocol: str
    numbers: dict[str, float | str] = Field(default_factory=dict)
    notes: str = ""

    @model_validator(mode="after")
    def _name_holds_preset(self) -> ManifestEntry:
        if self.preset not in PRESETS or self.name.partition(".")[0] != self.preset:
            raise ValueError("name must be an existing preset, a dot and the training")
        return self


class Manifest(Settings):
    """``manifest.yaml``: the trained models of a folder."""

    models: tuple[ManifestEntry, ...] = ()


def weight_folders() -> list[Path]:
    """Folders with a manifest: $HRSAM_WEIGHTS, then ``weights/`` of a checkout, then ``~/.cache/hrsam/weights``."""
    folders = []
    if chosen := os.environ.get("HRSAM_WEIGHTS"):
        if not (Path(chosen) / "manifest.yaml").is_file():
            raise ValueError(
                f"HRSAM_WEIGHTS is {chosen}, where there is no manifest.yaml; set it to a folder that has one"
            )
        folders.append(Path(chosen))
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        folders.append(root / "weights")
    folders.append(Path.home() / ".cache" / "hrsam" / "weights")
    return [folder for folder in folders if (folder / "manifest.yaml").is_file()]


def _listed() -> dict[str, tuple[Path, ManifestEntry]]:
    """Trained models by tag, with the folder they lie in; the first folder that lists a tag has it."""
    listed: dict[str, tuple[Path, ManifestEntry]] = {}
    for folder in weight_folders():
        for entry in read_settings(Manifest, folder / "manifest.yaml").models:
            listed.setdefault(entry.name, (folder, entry))
    return listed


def list_models() -> list[str]:
    """Names of all architectures, then the tags of trained models."""
    return [*PRESETS, *_listed()]


def describe_models() -> list[str]:
    """Lines for a person: architectures, and for each trained model size, licence, data and file."""
    lines = [f"architectures (random weights): {', '.join(PRESETS)}"]
    listed = _listed()
    for name, (folder, entry) in listed.items():
        lines.append(
            f"{name}  {entry.bytes / 1e6:.1f} MB, {entry.licence}; trained on {entry.data}; {folder / entry.file}"
        )
    return lines if listed else [*lines, "trained models: none is listed"]


# Foreign names -> ours, first match at the start of a name counts.
_HRSAM = (
    (r"backbone\.patch_embed\.proj\.", "encoder.patch_embed."),
    (r"backbone\.(?:ss_)?mamba_blocks\.", "encoder.scans."),
    (r"backbone\.ms_mamba_blocks\.", "encoder.scans_across."),
    (r"backbone\.multi_scale_fusion\.(\d+)\.0\.", r"encoder.fusion_norms.\1."),
    (r"backbone\.lateral_convs\.", "encoder.laterals."),
    (r"backbone\.out_conv\.0\.", "encoder.out_conv."),
    (r"backbone\.out_conv\.2\.", "encoder.out_norm."),
    (r"backbone\.", "encoder."),
    (r"neck\.pos_embed_layer\.", "prompt_encoder.pe_layer."),
    (r"neck\.point_embeds\.", "prompt_encoder.point_embeddings."),
    (r"neck\.", "prompt_encoder."),
    (r"decode_head\.", "mask_decoder."),
)
_HRSAM_SCAN = {
    "in_norm": "norm_in",
    "in_proj.0": "in_proj",
    "ssm_proj": "param_proj",
    "ssm_proj_bias": "dt_bias",
    "Ds": "D",
    "As_log": "A_log",
    "out_norm": "norm_out",
}
_SAM = (
    (r"image_encoder\.(blocks\.\d+\.mlp)\.lin", r"encoder.vit.\1.fc"),
    (r"image_encoder\.", "encoder.vit."),
)
_MAE = (
    (r"patch_embed\.proj\.", "encoder.patch_embed."),
    (r"(pos_embed$|blocks\.)", r"encoder.\1"),
)
_MAE_UNUSED = re.compile(r"(cls_token|mask_token)$|(norm|fc_norm|head)\.|decoder_")
_MAE_FRESH = re.compile(
    r"encoder\.(scans|scans_across|fusion_norms|laterals|out_conv|out_norm)\.|encoder\.blocks\.\d+\.attn\.padding$"
)
_LICENCES = {
    "hrsam": "none stated (the authors' repository carries no licence)",
    "sam": "Apache-2.0",
    "mae": "CC-BY-NC-4.0 as far as known",
}


def convert(
    source: str | Path,
    target: str | Path,
    origin: str,
    *,
    encoder_only: bool = False,
    preset: str | None = None,
    decoder_from: str | Path | None = None,
    licence: str | None = None,
    bgr: bool | None = None,
) -> dict[str, Any]:
    """Read foreign weights and write ours; returns what was done, by name.

    ``source``: a ``.pth`` pickle (read with ``weights_only=True``: no code of it runs) or safetensors.  ``origin``:

    * ``"hrsam"``: the authors' HRSAM or HRSAM++ (arXiv 2407.02109), trained on BGR.
    * ``"sam"``: Meta's ViT-B, -L or -H checkpoint (needs timm).
    * ``"mae"``: an MAE ViT as initial weights of the architecture ``preset``; what MAE lacks is drawn from seed 0.
      The paper starts so, with the decoder of SAM's ViT-H: ``decoder_from``.

    ``encoder_only``: write no prompt encoder and mask decoder.  ``licence`` and ``bgr`` (channel 0 is blue) override
    what is known of the origin.  Raises ``ValueError`` for whatever is wrong; then nothing was written.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    if origin not in _LICENCES:
        raise ValueError(f"there is no converter for {origin!r}; {suggest(origin, _LICENCES)}")
    if origin != "mae" and (preset is not None or decoder_from is not None):
        raise ValueError(
            f"preset and decoder_from are for MAE weights; the architecture of {origin!r} is read from the file"
        )
    if encoder_only and decoder_from is not None:
        raise ValueError("encoder_only writes no decoder; give it or decoder_from, not both")
    foreign = _read_foreign(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; give another name")
    summary: dict[str, Any] = {"read": f"{source.name}: {len(foreign)} tensors", "source_sha256": sha256(source)}
    fresh: dict[str, Tensor] = {}
    if origin == "hrsam":
        config, state = _from_hrsam(foreign, source)
    elif origin == "sam":
        config, state = _from_sam(foreign, source)
    else:
        config, state, fresh = _from_mae(foreign, source, preset)
        if decoder_from is not None:
            decoder = _read_foreign(Path(decoder_from))
            state |= {name: value for name, value in decoder.items() if name.startswith(DECODER)}
            summary["decoder_from"] = f"{Path(decoder_from).name}, SHA-256 {sha256(Path(decoder_from))}"
    has_decoder = any(name.startswith(DECODER) for name in state)
    if not encoder_only and not has_decoder:
        other = " or --decoder-from with a SAM checkpoint" if origin == "mae" else ""
        raise WeightsError(
            f"{decoder_from or source} holds no prompt encoder and mask decoder; give --encoder-only{other}"
        )
    ignored = {name.partition(".")[0] for name in foreign if origin == "mae" and _MAE_UNUSED.match(name)}
    if encoder_only:
        ignored |= {name.partition(".")[0] for name in state if name.startswith(DECODER)}
        state = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    config = ModelConfig(
        config.preset, config.encoder, bgr=origin == "hrsam" if bgr is None else bgr, decoder=not encoder_only
    )
    shapes = {name: tuple(value.shape) for name, value in (state | fresh).items()}
    model = assemble(config, shapes, lambda name: (state | fresh)[name].to(torch.float32), source)
    summary |= {
        "architecture": config.preset + (" (encoder only)" if encoder_only else ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ignored": ", ".join(sorted(ignored)) or "none",
        "drawn_afresh": f"{len(fresh)} tensors, seed 0" if fresh else "none",
        "channels": "BGR" if config.bgr else "RGB",
        "licence": licence or _LICENCES[origin],
    }
    kept = ("source_sha256", "decoder_from", "drawn_afresh", "licence")
    metadata = {"source": f"{origin} weights, {source.name}", **{k: summary[k] for k in kept if k in summary}}
    save(model, target, metadata=metadata)
    return {**summary, "written": str(target), "bytes": target.stat().st_size, "sha256": sha256(target)}


def _read_foreign(path: Path) -> dict[str, Tensor]:
    """Floating-point tensors by name, without the wrappers ``state_dict`` and ``model`` and the prefix ``module.``."""
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    if path.suffix == ".safetensors":
        with open_file(path) as file:
            values: Any = {name: file.get_tensor(name) for name in list(file.keys())}
    else:
        values = _unpickle(path)
    while isinstance(values, dict) and (key := next((k for k in ("state_dict", "model") if k in values), None)):
        values = values[key]
    if not isinstance(values, dict) or not values:
        raise WeightsError(f"{path} holds no weights by name but a {type(values).__name__}")
    for name, value in values.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype.is_floating_point
        if not isinstance(name, str) or not plain:
            what = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise WeightsError(f"{path}: {name!r} is not a floating-point tensor but {what}; give a plain state dict")
    prefix = "module." if all(name.startswith("module.") for name in values) else ""
    return {name[len(prefix) :]: value.detach() for name, value in values.items()}


def _unpickle(path: Path) -> Any:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise ValueError(
            f"a pickle can run code in torch {torch.__version__} (CVE-2025-32434); convert it with torch 2.10 or newer"
        )
    if version < (2, 10):
        logging.getLogger("hrsam").warning("torch below 2.10 has a memory fault with hostile pickles (CVE-2026-24747)")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise WeightsError(f"{path} unpacks to more than its own size, as no file written by torch does")
        # Without mmap, which does not compare the sizes that the pickle claims with those of the archive.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except WeightsError:
        raise
    except Exception as err:  # the unpickler lets a damaged file raise almost anything
        name = re.search(r"GLOBAL (\S+)", str(err))
        what = f"it names {name[1]}, which was not run" if name else f"{type(err).__name__}"
        raise WeightsError(
            f"{path} could not be read as a pickle of tensors ({what}); it is damaged, or holds more than weights"
        ) from None


def _from_hrsam(foreign: Mapping[str, Tensor], path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    across = any(name.startswith("backbone.ms_mamba_blocks.") for name in foreign)
    scan = "backbone.ss_mamba_blocks" if across else "backbone.mamba_blocks"
    width = _size(foreign, "backbone.patch_embed.proj.weight", 0, path)
    depth, stages = _count(foreign, "backbone.blocks"), _count(foreign, scan)
    encoder = EncoderConfig(
        width=width,
        depth=depth,
        heads=width // 64,
        scan_at=tuple((stage + 1) * depth // stages - 1 for stage in range(stages)),
        state=_size(foreign, f"{scan}.0.As_log", 1, path),
        cycles=_size(foreign, f"{scan}.0.gamma", 1, path),
        anchor_side=ANCHOR_SIDE if across else None,
    )
    state = {}
    for name, value in _renamed(foreign, _HRSAM, path).items():
        if scan_name := re.match(r"(encoder\.(?:scans|scans_across)\.\d+\.)(.+?)(\.weight|\.bias|)$", name):
            start, part, end = scan_name.groups()
            name = start + _HRSAM_SCAN.get(part, part) + end
            if part == "gamma" and value.ndim == 3:
                value = value.squeeze(2)
        state[name] = value
    frequencies = state.pop("encoder.rope.freqs", None)
    expected = 10_000.0 ** (-torch.arange(16) / 16)
    if frequencies is not None and (
        frequencies.shape != expected.shape or not torch.allclose(frequencies.float(), expected)
    ):
        raise WeightsError(
            f"{path}: backbone.rope.freqs are not 10000^(-2i/32); this model was trained with other positions"
        )
    return ModelConfig(_preset_of(encoder, "hrsam_pp" if across else "hrsam"), encoder), state


def _from_sam(foreign: Mapping[str, Tensor], path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    width = _size(foreign, "image_encoder.patch_embed.proj.weight", 0, path)
    grid = _size(foreign, "image_encoder.pos_embed", 1, path)
    # A table of relative positions has 2n - 1 rows for attention over n×n tokens.
    names = [f"image_encoder.blocks.{i}.attn.rel_pos_h" for i in range(_count(foreign, "image_encoder.blocks"))]
    seen = [(_size(foreign, name, 0, path) + 1) // 2 for name in names]
    encoder = SamVitConfig(
        width=width,
        depth=len(seen),
        heads=width // max(1, _size(foreign, "image_encoder.blocks.0.attn.rel_pos_h", 1, path)),
        global_at=tuple(index for index, span in enumerate(seen) if span == grid),
        window=min(seen),
        image_size=PATCH * grid,
    )
    return ModelConfig(_preset_of(encoder, "sam"), encoder), _renamed(foreign, _SAM, path)


def _from_mae(
    foreign: Mapping[str, Tensor], path: Path, preset: str | None
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, MAE's tensors and those drawn afresh."""
    fitting = [name for name in PRESETS if name.startswith("hrsam")]
    if preset not in fitting:
        raise ValueError(f"got preset {preset!r}; MAE weights can start one of {', '.join(fitting)}")
    _size(foreign, "patch_embed.proj.weight", 0, path)
    used = {name: value for name, value in foreign.items() if not _MAE_UNUSED.match(name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(preset)
    fresh = {name: value for name, value in model.state_dict().items() if _MAE_FRESH.match(name)}
    return model.config, _renamed(used, _MAE, path), fresh


def _renamed(foreign: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in foreign.items():
        for pattern, ours in rules:
            if found := re.match(pattern, name):
                name = found.expand(ours) + name[found.end() :]
                break
        if name in state:
            raise WeightsError(f"{path} holds two tensors for {name}")
        state[name] = value
    return state


def _size(foreign: Mapping[str, Tensor], name: str, axis: int, path: Path) -> int:
    if name not in foreign or foreign[name].ndim <= axis:
        known = {"backbone.": "hrsam", "image_encoder.": "sam", "blocks.": "mae"}
        kinds = {kind for prefix, kind in known.items() if any(key.startswith(prefix) for key in foreign)}
        hint = (
            f"its names look like --from {' or '.join(sorted(kinds))}" if kinds else "its names are of no kind we know"
        )
        raise WeightsError(f"{path} has no proper tensor {name}; {hint}")
    return foreign[name].shape[axis]


def _count(foreign: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow ``prefix`` in the names."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in foreign)
    return len({match[1] for match in found if match})


def _preset_of(encoder: EncoderConfig | SamVitConfig, family: str) -> str:
    return next((name for name, make in PRESETS.items() if make().encoder == encoder), f"{family}_custom")
