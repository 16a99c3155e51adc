"""Time the encoder against the reference's data flow; the same as ``hrsam bench encoder``."""

import sys

from hrsam.cli import main

sys.argv[1:1] = ["bench", "encoder"]
main()
