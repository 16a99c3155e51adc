"""The same as ``hrsam evaluate``."""

import sys

from hrsam.cli import main

sys.argv.insert(1, "evaluate")
main()
