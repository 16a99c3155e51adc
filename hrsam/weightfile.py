"""One weight file: safetensors with metadata, written atomically and checked when read.

Safetensors hold numbers, and nothing in them can run.  Whatever is wrong with a file is one :class:`WeightsError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from hrsam.checkpoint import write_atomically
from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.sam_vit import SamVitConfig

FORMAT, VERSION = "hrsam", "1"
ENCODERS = {"hrsam": EncoderConfig, "sam": SamVitConfig}
OURS = ("format", "format_version", "preset", "config", "channels", "normalisation", "stored_as")  # metadata of save
KEPT_FLOAT32 = ("positional_encoding_gaussian_matrix", "A_log", "gamma")  # matrices whose rounding would show
DECODER = ("prompt_encoder.", "mask_decoder.")
MAX_HEADER = 16 * 2**20  # ours are some 60 kB; safetensors itself would parse 100 MB


class WeightsError(ValueError):
    """A weight file that is damaged, foreign or does not fit."""


def save(model: HRSAM, path: str | Path, *, metadata: Mapping[str, str], dtype: str | None = None) -> Path:
    """Write ``model`` to ``path`` (``.safetensors``), whole or not at all.

    ``metadata``: text about the weights; ``licence`` and ``source`` are required, ``training``, ``data`` and
    ``protocol`` usual.  Configuration, preset, channel order and normalisation are added.  ``dtype="float16"`` stores
    matrices in half precision; vectors and the few matrices of ``KEPT_FLOAT32`` stay float32.  Raises ``ValueError``
    for weights that are not finite (in that precision) and for missing or reserved metadata.
    """
    path = Path(path)
    check_target(path)
    if dtype not in (None, "float16"):
        raise ValueError(f"weights are stored as float32 (dtype=None) or 'float16'; got {dtype!r}")
    missing, clash = {"licence", "source"} - metadata.keys(), set(OURS) & metadata.keys()
    if missing or clash or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(
            f"metadata is text by name, with 'licence' and 'source' and without {', '.join(OURS)}; got {dict(metadata)}"
        )
    tensors = {}
    for name, value in model.state_dict().items():
        half = dtype == "float16" and value.ndim >= 2 and name.rpartition(".")[2] not in KEPT_FLOAT32
        value = value.to("cpu", torch.float16 if half else torch.float32).contiguous()
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite{' in float16' if half else ''}; {path} was not written")
        tensors[name] = value
    config = model.config
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "preset": config.preset,
        "config": config_to_json(config),
        "channels": "BGR" if config.bgr else "RGB",
        "normalisation": f"(v - {config.mean}) / {config.std} for v in 0..255, in the order of the channels",
        "stored_as": dtype or "float32",
        **metadata,
    }
    payload = to_bytes(tensors, header)

    def write(file: BinaryIO) -> None:
        file.write(payload)

    return write_atomically(path, write)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file written by :func:`save`; raises :class:`WeightsError` for any other."""
    with open_file(Path(path)) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} holds no hrsam metadata; weights of other programs are read by `hrsam convert`")
    if (version := metadata.get("format_version")) != VERSION:
        raise WeightsError(
            f"{path} has format version {version!r}, this hrsam reads {VERSION!r}; install a newer hrsam"
        )
    return metadata


def load_file(path: Path) -> HRSAM:
    metadata = read_metadata(path)
    try:
        config = config_from_json(metadata.get("config", ""))
    except ValueError as err:
        raise WeightsError(f"{path}: {err}") from None
    with open_file(path) as file:
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        for name, part in slices.items():
            if part.get_dtype() not in ("F32", "F16"):
                raise WeightsError(f"{path}: {name} is stored as {part.get_dtype()}; expected F32 or F16")
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        return assemble(config, shapes, lambda name: file.get_tensor(name).to(torch.float32, copy=True), path).eval()


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An open safetensors file whose header length was checked; the library's errors become ours."""
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    with path.open("rb") as raw:
        start = raw.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(path.stat().st_size - 8, MAX_HEADER):
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise WeightsError(f"{path} is a pickle, which is never loaded directly; run `hrsam convert` on it once")
        raise WeightsError(f"{path} is not a safetensors file, or it is cut off in its header")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as err:
        raise WeightsError(f"{path} is not a sound safetensors file: {' '.join(str(err).split())[:200]}") from None


def assemble(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], path: Path
) -> HRSAM:
    """A model from tensors that are read only after all names and shapes were found right."""
    try:
        _check_config(config)
        with torch.device("meta"):  # sizes of a hostile file cost no memory
            model = HRSAM(config)
    except ValueError as err:
        raise WeightsError(f"{path} describes a model that cannot be built: {err}") from None
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if problem := _misfit(shapes, wanted):
        raise WeightsError(f"{path} does not fit the architecture {config.preset}: {problem}")
    state = {}
    for name in wanted:
        state[name] = read(name)
        if not state[name].isfinite().all():
            raise WeightsError(f"{path}: {name} holds NaN or infinity; the training diverged or the file is damaged")
    model.load_state_dict(state, assign=True)
    return model


def _misfit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing, surplus and of another shape, ten names of each, and the likely cause; empty when all fits."""
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    other = [f"{n} {found[n]} instead of {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    groups = (("missing", missing), ("surplus", surplus), ("of another shape", other))
    parts = [
        f"{len(names)} {what} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
        for what, names in groups
        if names
    ]
    if not parts:
        return ""
    if any("scans_across" in name for name in surplus):
        cause = "these are HRSAM++ weights, the architecture has no anchor map"
    elif any("scans_across" in name for name in missing):
        cause = "these are HRSAM weights, the architecture is HRSAM++"
    elif missing and all(name.startswith(DECODER) for name in missing):
        cause = "parts of the prompt encoder or mask decoder are not there"
    elif other and not missing and not surplus:
        cause = "the sizes are those of another architecture"
    elif missing and not surplus:
        cause = "the file is incomplete"
    else:
        cause = "the file was written for another architecture or by another program"
    return f"{'; '.join(parts)}: {cause}"


def config_to_json(config: ModelConfig) -> str:
    """All fields of ``config`` as JSON; :func:`config_from_json` reads it back."""
    kind = next(name for name, kind in ENCODERS.items() if isinstance(config.encoder, kind))
    values = asdict(config)
    return json.dumps({**values, "encoder": {"kind": kind, **values["encoder"]}})


def config_from_json(text: str) -> ModelConfig:
    """Inverse of :func:`config_to_json`; raises ``ValueError`` for anything else."""
    try:
        values = json.loads(text)
        encoder = values.pop("encoder")
        kind = ENCODERS[encoder.pop("kind")]
        known = {field.name for part in (kind, ModelConfig) for field in fields(part)}
        if unknown := sorted((encoder.keys() | values.keys()) - known):
            raise ValueError(f"unknown setting {unknown[0]!r}")
        encoder = TypeAdapter(kind).validate_json(json.dumps(encoder), strict=True)
        return TypeAdapter(ModelConfig).validate_python({**values, "encoder": encoder})
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the stored configuration is wrong at {where}: {first['msg'].lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"the stored configuration is not readable ({type(err).__name__}: {err})") from None


def _check_config(config: ModelConfig) -> None:
    """Bounds that keep a hostile configuration from building for ever, and relations the modules take for granted."""
    encoder = config.encoder
    for name, value in vars(encoder).items():
        if isinstance(value, int) and not 1 <= value <= (256 if name == "depth" else 2**16):
            raise ValueError(f"{name} is {value}")
    if encoder.width % encoder.heads:
        raise ValueError(f"width {encoder.width} is not a multiple of heads {encoder.heads}")
    special = encoder.global_at if isinstance(encoder, SamVitConfig) else encoder.scan_at
    if list(special) != sorted(set(special) & set(range(encoder.depth))):
        raise ValueError(f"blocks {special} are not ascending numbers below the depth {encoder.depth}")
    if isinstance(encoder, EncoderConfig) and not (encoder.mixers and encoder.scan_at and 0 < encoder.mlp_ratio <= 64):
        raise ValueError(f"mixers {encoder.mixers}, scan_at {encoder.scan_at}, mlp_ratio {encoder.mlp_ratio}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def check_target(path: Path) -> None:
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}; give a name that ends in .safetensors, in a folder that exists")
