"""A first look: the bundled photograph, a few clicks, the overlay."""

from hrsam.demo.tour import tour

__all__ = ["tour"]
