"""``python -m hrsam`` is the ``hrsam`` command."""

from hrsam.cli import main

main()
