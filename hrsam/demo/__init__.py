"""A first look: the bundled photograph and a few clicks in a terminal, or any pictures and a page in a browser."""

from hrsam.demo.engine import apart
from hrsam.demo.opening import open_page
from hrsam.demo.tour import tour

__all__ = ["apart", "open_page", "tour"]
