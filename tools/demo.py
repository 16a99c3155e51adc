"""The same as ``hrsam demo``."""

import sys

from hrsam.cli import main

if __name__ == "__main__":  # the process that decodes uploads imports this file too
    sys.argv.insert(1, "demo")
    main()
