"""Averaged weights of a training run -> a weight file for weights/, and its manifest entry on the screen.

python tools/export_starter.py out/starter weights/hrsam_pp_t.starter.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hrsam.release import release
from hrsam.weightfile import sha256

LICENCE = "research and trying out only: the training data includes non-commercial sources"
DATA = (
    "3,811 photographs with 6,756 masks from VOC2012 animals, Clothing Co-Parsing, BSDS500, COCO128-seg, WGISD "
    "and three small sets, long side at most 448"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    metadata = {"source": "trained by this project", "data": DATA}
    training = release(args.run, args.target, dtype="float16", licence=LICENCE, metadata=metadata)
    print(f"file: {args.target.name}\nsha256: {sha256(args.target)}\nbytes: {args.target.stat().st_size}")
    print(f"licence: {LICENCE}\ndata: {DATA}\nnotes: {training}")


if __name__ == "__main__":
    main()
