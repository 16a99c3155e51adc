"""Operations: the maths in words, the naive twin that defines it, and the choice of implementation."""

from hrsam.ops.full import full_attention
from hrsam.ops.window import window_attention

MIXERS = {
    "window": window_attention,
    "full": full_attention,
}  # name in a config -> function; one line per variant
