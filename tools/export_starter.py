"""Averaged weights of a training run -> a weight file for weights/, and its manifest entry on the screen.

python tools/export_starter.py out/starter/checkpoints/step-00003850-*.pt weights/hrsam_pp_t.starter.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hrsam.checkpoint import load_state
from hrsam.weightfile import save, sha256
from hrsam.weights import build

LICENCE = "research and trying out only: the training data includes non-commercial sources"
DATA = (
    "3,811 photographs with 6,756 masks from VOC2012 animals, Clothing Co-Parsing, BSDS500, COCO128-seg, WGISD "
    "and three small sets, long side at most 448"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    state = load_state(args.state)
    model = build(state["settings"]["preset"])
    model.load_state_dict(state["average"])
    phases = "; ".join(f"{p['steps']} steps at {p['side']} px" for p in state["settings"]["phases"])
    training = (
        f"from random weights, supervised with simulated clicks, averaged weights of step {state['step']} ({phases})"
    )
    metadata = {"licence": LICENCE, "source": "trained by this project", "data": DATA, "training": training}
    save(model, args.target, metadata=metadata, dtype="float16")
    print(f"file: {args.target.name}\nsha256: {sha256(args.target)}\nbytes: {args.target.stat().st_size}")
    print(f"licence: {LICENCE}\ndata: {DATA}\nnotes: {training}")


if __name__ == "__main__":
    main()
