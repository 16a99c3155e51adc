"""The same as ``hrsam demo``."""

import sys

from hrsam.cli import main

sys.argv.insert(1, "demo")
main()
