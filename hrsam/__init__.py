"""Cut objects out of high-resolution pictures by clicking: HRSAM and HRSAM++.

>>> import hrsam                                                    # doctest: +SKIP
>>> session = hrsam.Session(hrsam.load("hrsam_pp_t.starter"))       # doctest: +SKIP
>>> session.set_image(hrsam.read_image("photo.jpg").pixels)         # doctest: +SKIP
>>> mask = session.click(x=400, y=300).mask                         # doctest: +SKIP
"""

from hrsam.clicks import Click
from hrsam.frame import Frame
from hrsam.images import read_image, read_mask
from hrsam.layout import Layout
from hrsam.models.model import HRSAM, Decoded, Embedding
from hrsam.predictor import Predictor
from hrsam.session import EncodedPicture, Prediction, Round, Session
from hrsam.weights import build, list_models, load

__all__ = [
    "HRSAM",
    "Click",
    "Decoded",
    "Embedding",
    "EncodedPicture",
    "Frame",
    "Layout",
    "Prediction",
    "Predictor",
    "Round",
    "Session",
    "build",
    "list_models",
    "load",
    "read_image",
    "read_mask",
]
