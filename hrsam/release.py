"""From a run to a weight file that everything else here takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hrsam.checkpoint import load_state, newest_checkpoint
from hrsam.loop import FOLDER
from hrsam.models.presets import build
from hrsam.weightfile import save


def release(
    run: str | Path,
    target: str | Path,
    *,
    weights: str = "average",
    dtype: str | None = None,
    licence: str = "not stated",
    metadata: dict[str, str] | None = None,
) -> str:
    """Write the ``weights`` of the last whole checkpoint in the folder ``run`` to ``target`` (``.safetensors``).

    ``dtype``: None for float32, or ``"float16"``.  ``metadata`` more of it, see :func:`hrsam.weightfile.save`, or other than
    what the run says itself.  Returns how these weights were trained, in one line, which is also in the file.
    Raises ``ValueError`` for a folder without a run and for weights that cannot be stored.
    """
    if weights not in ("average", "last"):
        raise ValueError(f"a run has weights 'average' and 'last'; got {weights!r}")
    folder = Path(run) / FOLDER
    path = newest_checkpoint(folder) if folder.is_dir() else None
    if path is None:
        raise ValueError(f"{run} holds no checkpoint; give the folder that was a training's out")
    state = load_state(path)
    model = build(state["settings"]["preset"])
    model.load_state_dict(state["model" if weights == "last" else "average"])
    training = how_trained(state, weights)
    told = {"licence": licence, "source": "a training with hrsam", "training": training, **(metadata or {})}
    save(model, target, metadata=told, dtype=dtype)
    return training


def how_trained(state: dict[str, Any], weights: str) -> str:
    settings = state["settings"]
    kind = f"distilled from {settings['teacher']}" if "teacher" in settings else "trained with simulated clicks"
    phases = ", ".join(f"{p['steps']} at {p['side']} px" for p in settings["phases"])
    return f"from {settings['start'] or 'random weights'}, {kind}, {weights} weights of step {state['step']} ({phases})"
