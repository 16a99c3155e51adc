"""The click page's server with its model on a GPU; ``pip install 'hrsam[demo]'`` is all it needs there."""

import pytest

from hrsam import load
from hrsam.bench.demo import picture
from hrsam.bench.page_client import Client, serving
from hrsam.cutting import Cutting
from hrsam.demo import messages
from hrsam.demo.limits import LIMITS
from hrsam.demo.site import Site
from hrsam.images import write_png
from hrsam.pyramid import open_pyramid

SIDE = 2048
MIDDLE = {"do": "click", "object": 1, "x": 1000.0, "y": 1000.0, "positive": True}
COMMANDS = [
    MIDDLE,
    {"do": "click", "object": 1, "x": 60.0, "y": 60.0, "positive": False},
    {"do": "undo", "object": 1},
    {"do": "redo", "object": 1},
    {"do": "add"},
    {"do": "box", "object": 2, "x0": 300.0, "y0": 300.0, "x1": 1700.0, "y1": 1700.0},
    {"do": "refine", "object": 1},
    {"do": "click", "object": 1, "x": 1100.0, "y": 1050.0, "positive": True},
]


@pytest.mark.gpu
def test_the_page_on_a_gpu_shows_what_the_api_cuts(tmp_path):
    path = tmp_path / "picture.png"
    write_png(path, picture(SIDE))
    model = load("hrsam_pp_t.starter", "cuda")
    alone, areas = Cutting(model, open_pyramid(path), 1024), []
    with serving(Site(model, "hrsam_pp_t.starter", [path], tmp_path / "state", side=1024)) as url:
        client = Client(url)
        assert client.json("GET", "/api/about")["device"].startswith("cuda")
        tab = client.open(client.desk())
        for command in COMMANDS:
            header, code = tab.do(**command)
            assert "error" not in header, header
            alone.apply(command)
            if number := command.get("object"):
                assert code == messages.draw(alone.objects[number], 0, LIMITS.mask_side, LIMITS.mask_bytes)[1]
                areas.append(alone.objects[number].mask.area)
        tab.close()
    assert min(areas) > 0
