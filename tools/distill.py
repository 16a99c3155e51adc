"""The same as ``hrsam distill``."""

import sys

from hrsam.cli import main

sys.argv.insert(1, "distill")
main()
