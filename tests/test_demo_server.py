"""The click page's server as a page sees it: pictures, desks, answers, exports, and what it says when something is wrong."""

import io
import json
import os
import threading
import time
from dataclasses import replace
from importlib import metadata
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from hrsam import cutting as cutting_module
from hrsam import native, rle
from hrsam.bench.hostile_files import png
from hrsam.bench.page_client import Client, serving
from hrsam.clicklog import read_log, replay
from hrsam.cutting import Cutting
from hrsam.demo import desk as desk_module
from hrsam.demo import journal as journal_module
from hrsam.demo import live, messages, outline
from hrsam.demo.engine import Work
from hrsam.demo.journal import JournalError, read_journal
from hrsam.demo.limits import LIMITS
from hrsam.demo.server import listen
from hrsam.demo.site import Site
from hrsam.pyramid import InMemory, open_pyramid
from hrsam.session import Session
from tests.builders import photo, small_model

HEIGHT, WIDTH, SIDE = 90, 120, 64
CLICKS = [(30, 40, True), (100, 80, False), (64.25, 12.5, True), (5, 5, False)]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    for index in range(2):
        (made / f"{index}.png").write_bytes(png(photo(HEIGHT, WIDTH, index)))
    (made / "broken.png").write_bytes(png(photo(HEIGHT, WIDTH))[:500])
    return made


@pytest.fixture
def make_site(model, folder, tmp_path):
    def make(**limits):
        return Site(model, "small.test", [folder], tmp_path / "state", side=SIDE, limits=replace(LIMITS, **limits))

    return make


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def client(site):
    with serving(site) as url:
        yield Client(url)


@pytest.fixture
def tab(client):
    made = client.open(client.desk())
    yield made
    made.close()


def mask_of(header, payload):
    """(HEIGHT, WIDTH) bool from a mask message."""
    out = np.zeros((HEIGHT, WIDTH), bool)
    where = header["mask"]
    if where["width"]:
        assert where["step"] == 1
        samples = outline.decode(payload, where["height"], where["width"])
        out[where["y"] : where["y"] + where["height"], where["x"] : where["x"] + where["width"]] = samples
    return out


def kind(answer):
    return answer[0]["error"]["kind"]


def hold(site):
    """Keep the engine busy; returns what lets it go on."""
    begun, go = threading.Event(), threading.Event()
    site.engine.submit("hold", Work(lambda: (begun.set(), go.wait(20))))
    assert begun.wait(10)
    return go.set


def test_it_runs_without_being_installed(client, monkeypatch):
    assert client.json("GET", "/api/about")["version"] == version("hrsam")
    monkeypatch.setattr(metadata.Distribution, "from_name", lambda name: missing(name))
    assert client.json("GET", "/api/about")["version"] == "not installed"


def missing(name):
    raise metadata.PackageNotFoundError(name)


def test_pictures_and_tiles(client, folder):
    about = client.json("GET", "/api/about")
    assert (about["model"], about["preset"], about["device"], about["side"]) == ("small.test", "test", "cpu", SIDE)
    found = client.json("GET", "/api/pictures")
    assert [entry["name"] for entry in found] == ["0.png", "1.png", "broken.png"]
    assert found[0].keys() == {"id", "name"}
    one = client.json("GET", f"/api/pictures/{found[1]['id']}")
    assert one == {**found[1], "width": WIDTH, "height": HEIGHT, "tile": 512, "levels": 1, "notes": []}
    status, headers, body = client.ask("GET", f"/api/pictures/{found[1]['id']}/tiles/0/0/0")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert "immutable" in headers["cache-control"]
    shown = np.asarray(Image.open(io.BytesIO(body))).astype(int)
    assert np.abs(shown - open_pyramid(folder / "1.png").pixels).mean() < 40  # noise, as JPEG
    status, _, body = client.ask("GET", f"/api/pictures/{found[2]['id']}")
    assert status == 415
    assert json.loads(body)["error"]["text"].startswith("cannot be read")
    assert str(folder).encode() not in body


def test_clicks_boxes_undo_and_redo_give_a_sessions_masks(tab, model):
    session = Session(model, SIDE)
    session.set_image(photo(HEIGHT, WIDTH, 0))
    for number, click in enumerate(CLICKS, 1):
        header, payload = tab.click(*click)
        session.click(*click)
        np.testing.assert_array_equal(mask_of(header, payload), session.mask)
        assert (header["seq"], header["revision"]) == (number, number)
        shown = header["object"]
        assert (shown["rounds"], shown["can_undo"], shown["can_redo"], shown["version"]) == (
            number,
            True,
            False,
            number,
        )
        assert shown["clicks"] == [[float(x), float(y), positive] for x, y, positive in CLICKS[:number]]
        assert shown["area"] == session.mask.sum()
        assert shown["iou"] == pytest.approx(session.rounds[-1].prediction.iou)
        assert header["ms"]["decode"] > 0
        assert set(header["ms"]) == {"queue", "encode", "decode", "mask"}
    for do in ("undo", "undo", "redo"):
        answer = tab.do(do=do, object=1)
        getattr(session, do)()
        np.testing.assert_array_equal(mask_of(*answer), session.mask)
    header, payload = tab.do(do="box", object=1, x0=10, y0=5, x1=100, y1=70)
    session.box(10, 5, 100, 70)
    np.testing.assert_array_equal(mask_of(header, payload), session.mask)
    assert header["object"]["box"] == [10, 5, 100, 70]
    header, payload = tab.do(do="clear", object=1)
    assert (header["mask"]["width"], header["object"]["bbox"], header["object"]["iou"], payload) == (0, None, None, b"")


def test_objects_are_added_described_and_removed(tab):
    tab.click(*CLICKS[0])
    header, _ = tab.do(do="add", name="cup", colour="#102030")
    assert (header["object"]["id"], header["object"]["name"], header["object"]["colour"]) == (2, "cup", "#102030")
    assert tab.click(50, 50, object=2)[0]["object"]["id"] == 2
    header, _ = tab.do(do="describe", object=1, name="<b>cat</b>")
    assert (header["object"]["name"], header["object"]["rounds"]) == ("<b>cat</b>", 1)
    header, payload = tab.do(do="remove", object=2)
    assert (header["removed"], payload) == (2, b"")
    assert "object" not in header
    assert kind(tab.click(50, 50, object=2)) == "gone"
    assert tab.do(do="add")[0]["object"]["id"] == 3


def test_a_refused_command_changes_nothing(tab, site):
    tab.click(*CLICKS[0])
    for command in (
        {"do": "click", "object": 1, "x": 500, "y": 1, "positive": True},
        {"do": "redo", "object": 1},
        {"do": "box", "object": 1, "x0": 9, "y0": 9, "x1": 1, "y1": 1},
        {"do": "dance", "object": 1},
        {"do": "given", "object": 1, "rle": {"size": [9, 9], "counts": "Q3"}},
    ):
        header, _ = tab.do(**command)
        assert header["error"]["kind"] == "refused"
        assert header["error"]["text"].count(". ") == 0
    header, _ = tab.do(do="describe", object=1, name="same")
    assert (header["revision"], header["object"]["rounds"]) == (2, 1)


def test_a_late_click_is_applied_to_what_is_there(client):
    desk = client.desk()
    one, two = client.open(desk), client.open(desk)
    one.click(*CLICKS[0])
    assert two.revision == 0  # it saw nothing of the first
    header, _ = two.click(*CLICKS[1])
    assert (header["revision"], header["object"]["rounds"]) == (2, 2)
    news = [one.next()]
    assert "seq" not in news[0][0]
    assert (news[0][0]["revision"], news[0][0]["object"]) == (2, header["object"])
    heard, _ = two.masks[1]
    assert (heard["revision"], heard.get("seq")) == (1, None)
    two.do(do="add")
    two.do(do="remove", object=2)
    assert [one.next()[0].get("removed") for _ in range(2)] == [None, 2]
    one.close()
    two.close()


def test_who_connects_again_finds_everything(client, make_site, site, folder):
    desk = client.desk()
    first = client.open(desk)
    answers = [first.click(*click) for click in CLICKS]
    first.do(do="add", name="empty")
    first.close()
    again = client.open(desk)
    assert again.state["revision"] == 5
    assert [thing["name"] for thing in again.state["objects"]] == ["object 1", "empty"]
    assert again.state["objects"][0] == answers[-1][0]["object"]
    assert again.masks.keys() == {1}
    assert again.masks[1][1] == answers[-1][1]
    again.close()
    site.desks.rest()
    site.engine.submit("x", Work(lambda: [d.do_sleep() for d in site.desks._list()])).result(10)
    woken = client.open(desk)  # by replay
    assert (woken.state, woken.masks) == (again.state, again.masks)
    header, _ = woken.do(do="undo", object=1)
    assert header["object"]["rounds"] == 3
    woken.close()


def test_a_restart_with_the_same_state_finds_everything(make_site):
    with serving(make_site()) as url:
        client = Client(url)
        desk = client.desk()
        tab = client.open(desk)
        answers = [tab.click(*click) for click in CLICKS]
        tab.close()
        cookie = client.cookie
    with serving(make_site()) as url:
        client = Client(url)
        owner = cookie.split("=", 1)[1]
        client.cookie = f"{client.cookie.split('=')[0]}={owner}"
        tab = client.open(desk)
        assert tab.state["objects"][0] == answers[-1][0]["object"]
        assert tab.masks[1][1] == answers[-1][1]
        assert tab.do(do="undo", object=1)[1] == answers[-2][1]
        tab.close()


def test_a_picture_that_changed_or_another_side_is_gone(make_site, folder, model, tmp_path):
    with serving(make_site()) as url:
        client = Client(url)
        desk = client.desk()
        client.open(desk).close()
        cookie = client.cookie.split("=", 1)[1]
    path, about = folder / "0.png", (folder / "0.png").stat()
    other = png(photo(HEIGHT, WIDTH, 1)[:, ::-1])[: about.st_size]
    for change in ("side", "bytes", "picture"):
        side = SIDE * 2 if change == "side" else SIDE
        if change == "bytes":  # nothing of it shows in the folder
            path.write_bytes(other + bytes(about.st_size - len(other)))
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        if change == "picture":
            path.write_bytes(png(photo(HEIGHT, WIDTH, 7)))
        with serving(Site(model, "small.test", [folder], tmp_path / "state", side=side)) as url:
            client = Client(url)
            client.cookie = f"{client.cookie.split('=')[0]}={cookie}"
            with pytest.raises(ConnectionError, match=r"open .* anew"):
                client.open(desk)


def test_others_see_nothing_of_it(client, site):
    desk = client.desk()
    tab = client.open(desk)
    tab.click(*CLICKS[0])
    host, other = client.host, Client(f"http://{client.host}/?token={_token(client)}")
    assert other.cookie != client.cookie
    assert host == other.host
    for path in ("export/mask.png", "export/log.json", "masks/1/1/0/0/0"):
        assert other.ask("GET", f"/api/desks/{desk}/{path}")[0] == 404
    assert other.ask("POST", f"/api/desks/{desk}/given?object=1", b"x")[0] == 404
    with pytest.raises(ConnectionError, match="no such piece of work"):
        other.open(desk)
    with pytest.raises(ConnectionError, match="no such piece of work"):
        client.open("A" * 22)
    tab.close()


def _token(client):
    return client.url.rsplit("=", 1)[1]


def test_a_desk_that_is_unknown_is_closed_with_its_code(client):
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    with connect(
        f"ws://{client.host}/api/desks/{'A' * 22}/live",
        origin=f"http://{client.host}",
        additional_headers={"Cookie": client.cookie},
    ) as socket:
        assert messages.unpack(socket.recv(10))[0]["error"]["kind"] == "gone"
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(10)
    assert caught.value.rcvd.code == live.NO_SUCH_DESK


def test_an_undo_takes_back_the_click_that_waits_and_nothing_else(tab, site):
    before = tab.click(*CLICKS[0])
    go = hold(site)
    second = tab.send(do="click", object=1, x=60, y=60, positive=True)
    third = tab.send(do="click", object=1, x=70, y=60, positive=True)
    undo = tab.send(do="undo", object=1)
    time.sleep(0.1)
    go()
    header, payload = tab.answer(second)
    assert header["object"]["rounds"] == 2
    assert kind(tab.answer(third)) == "superseded"
    undone = tab.answer(undo)
    assert (undone[0]["unchanged"], undone[0]["revision"], undone[0]["object"]["rounds"]) == (True, 2, 2)
    assert undone[1] == payload
    assert tab.do(do="undo", object=1)[1] == before[1]  # with none waiting it takes back the last


def test_clear_and_remove_drop_what_waits(tab, site):
    tab.do(do="add")
    go = hold(site)
    sent = [
        tab.send(do="click", object=1, x=60, y=60, positive=True),
        tab.send(do="click", object=2, x=6, y=6, positive=True),
    ]
    sent += [
        tab.send(do="clear", object=1),
        tab.send(do="click", object=2, x=6, y=6, positive=True),
        tab.send(do="remove", object=2),
    ]
    time.sleep(0.1)
    go()
    answers = [tab.answer(seq)[0] for seq in sent]
    assert [answer.get("error", {}).get("kind") for answer in answers] == ["superseded"] * 2 + [
        None,
        "superseded",
        None,
    ]
    assert answers[2]["object"]["rounds"] == 0
    assert answers[4]["removed"] == 2


def test_the_ninth_that_waits_is_busy(tab, site):
    go = hold(site)
    sent = [tab.send(do="add") for _ in range(10)]
    time.sleep(0.2)
    go()
    kinds = [tab.answer(seq)[0].get("error", {}).get("kind") for seq in sent]
    assert kinds == [None] * 8 + ["busy"] * 2
    assert "error" not in tab.do(do="add")[0]


def test_a_socket_for_which_there_is_no_room_is_told_to_come_later(make_site):
    site = make_site(waiting=1)
    with serving(site) as url:
        client = Client(url)
        desk = client.desk()
        go = hold(site)
        site.engine.submit("other", Work(lambda: None))
        with pytest.raises(ConnectionError, match="too much to do"):
            client.open(desk)
        go()
        client.open(desk).close()


def test_too_many_messages_are_busy_and_then_the_end(make_site):
    with serving(make_site(messages_per_second=0.001, message_burst=3, refused_in_a_row=5)) as url:
        client = Client(url)
        tab = client.open(client.desk())
        for _ in range(3):
            assert "error" not in tab.do(do="add")[0]
        for _ in range(6):
            tab.send(do="add")
        for _ in range(5):
            assert tab.next()[0] == {"error": {"kind": "busy", "text": "too many messages a second; send fewer"}}
        from websockets.exceptions import ConnectionClosed

        with pytest.raises(ConnectionClosed) as caught:
            tab.next()
        assert caught.value.rcvd.code == live.TOO_MANY


def test_a_desk_a_second_is_not_allowed_for_ever(make_site):
    with serving(make_site(new_desks_a_minute=2)) as url:
        client = Client(url)
        client.desk()
        client.desk()
        with pytest.raises(ConnectionError, match="503"):
            client.desk()


def test_what_cannot_be_saved_has_not_happened(tab, monkeypatch, site):
    before = tab.click(*CLICKS[0])
    right = journal_module.Journal.append

    def full(self, command, most):
        raise JournalError("work cannot be saved (No space left on device); free some space and try again")

    monkeypatch.setattr(journal_module.Journal, "append", full)
    header, _ = tab.click(*CLICKS[1])
    assert header["error"] == {
        "kind": "refused",
        "text": "work cannot be saved (No space left on device); free some space and try again",
    }
    monkeypatch.setattr(journal_module.Journal, "append", right)
    header, payload = tab.do(do="describe", object=1, name="again")
    assert (header["revision"], header["object"]["rounds"], payload) == (2, 1, before[1])


def test_an_answer_means_that_the_journal_has_it(tab, client, site):
    for number, click in enumerate(CLICKS, 1):
        tab.click(*click)
        assert len(read_journal(site.desks.path(tab.state["desk"]))[1]) == number


@pytest.mark.parametrize("where", ["encode", "decode"])
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_leaves_the_next_request_working(client, site, monkeypatch, where, times):
    tab = client.open(client.desk())
    wanted = [tab.click(*click)[1] for click in CLICKS[:2]]
    tab.do(do="undo", object=1)
    left = [times]
    name = "encode" if where == "encode" else "prepare"
    right = getattr(Cutting, name)

    def fail(self, *arguments):
        if left[0]:
            left[0] -= 1
            raise MemoryError
        return right(self, *arguments)

    monkeypatch.setattr(Cutting, name, fail)
    answer = tab.click(*CLICKS[1])
    if times == 2:
        assert kind(answer) == "memory"
        assert "--side 256" in answer[0]["error"]["text"]
        answer = tab.click(*CLICKS[1])
    assert (answer[0]["revision"], answer[1]) == (4, wanted[1])
    tab.close()


def test_embeddings_are_shared_by_desks_and_bounded(make_site, monkeypatch):
    calls = []
    right = desk_module.Cutting.encode
    monkeypatch.setattr(Cutting, "encode", lambda self: calls.append(self.picture is None) or right(self))
    with serving(make_site(embeddings_bytes=1, regions_bytes=1)) as url:
        client = Client(url)
        ids = [entry["id"] for entry in client.json("GET", "/api/pictures")[:2]]
        tabs = [client.open(client.desk(id)) for id in (ids[0], ids[0], ids[1])]
        for tab in tabs[:2]:
            tab.click(*CLICKS[0])
        assert sum(calls) == 3  # 0, then 1, then 0 again for both its desks
        assert tabs[0].click(*CLICKS[1])[1] == tabs[1].click(*CLICKS[1])[1]
        for tab in tabs:
            tab.close()


@pytest.mark.parametrize(("regions_bytes", "encodes"), [(1 << 30, 0), (1, 1)])
def test_regions_are_kept_by_the_desks_last_used(make_site, monkeypatch, regions_bytes, encodes):
    monkeypatch.setattr(native, "_agrees", lambda *_: True)  # a random model never agrees with itself
    calls = []
    right = cutting_module.encode_picture
    monkeypatch.setattr(cutting_module, "encode_picture", lambda *a, **k: calls.append(1) or right(*a, **k))
    with serving(make_site(regions_bytes=regions_bytes)) as url:
        client = Client(url)
        one, two = client.open(client.desk()), client.open(client.desk())
        given = np.zeros((HEIGHT, WIDTH), bool)
        given[40:60, 50:70] = True
        one.do(do="given", object=1, rle=rle.encode(given))
        assert one.do(do="refine", object=1)[0]["object"]["rounds"] == 2
        before = len(calls)
        two.click(*CLICKS[0])
        one.click(60, 50)
        assert len(calls) - before == encodes
        one.close()
        two.close()


def test_desks_beyond_the_limit_sleep_and_wake(make_site):
    site = make_site(desks_awake=2)
    with serving(site) as url:
        client = Client(url)
        tabs = [client.open(client.desk()) for _ in range(4)]
        assert sum(desk.view is not None for desk in site.desks._list()) == 2
        answers = [tab.click(*CLICKS[0])[1] for tab in tabs]
        assert len(set(answers)) == 1
        assert sum(desk.view is not None for desk in site.desks._list()) == 2
        assert [tab.click(*CLICKS[1])[0]["object"]["rounds"] for tab in tabs] == [2] * 4
        for tab in tabs:
            tab.close()


def test_idle_desks_are_forgotten_but_not_lost(make_site):
    site = make_site(desk_idle_seconds=0.2)
    with serving(site) as url:
        client = Client(url)
        desk = client.desk()
        tab = client.open(desk)
        tab.click(*CLICKS[0])
        until = time.monotonic() + 10
        while site.desks._list()[0].view is not None and time.monotonic() < until:
            time.sleep(0.02)
        assert site.desks._list()[0].view is None  # asleep, and known as long as somebody looks
        assert tab.click(*CLICKS[1])[0]["object"]["rounds"] == 2
        tab.close()
        while site.desks._list() and time.monotonic() < until:
            time.sleep(0.02)
        assert site.desks._list() == []
        tab = client.open(desk)
        assert tab.state["revision"] == 2
        tab.close()


def test_exports_are_files_of_the_masks(client, tab, model, folder):
    tab.click(*CLICKS[0])
    header, payload = tab.click(*CLICKS[1])
    want, desk = mask_of(header, payload), tab.state["desk"]

    def export(name):
        status, headers, body = client.ask("GET", f"/api/desks/{desk}/export/{name}")
        assert status == 200
        assert headers["content-disposition"].startswith("attachment; filename=")
        assert headers["x-content-type-options"] == "nosniff"
        return headers, body

    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(export("mask.png?object=1")[1]))) > 0, want)
    cut = np.asarray(Image.open(io.BytesIO(export("cutout.png?object=1&whole=true")[1])))
    np.testing.assert_array_equal(cut[..., 3] > 0, want)
    np.testing.assert_array_equal(cut[want][:, :3], photo(HEIGHT, WIDTH, 0)[want])
    document = json.loads(export("coco.json")[1])
    assert document["annotations"][0]["area"] == want.sum()
    assert document["images"][0]["file_name"] == "0.png"
    log = read_log(export("log.json")[1])
    again = replay(log, model, open_pyramid(folder / "0.png"))
    np.testing.assert_array_equal(again.objects[1].mask.array(), want)
    headers, body = export("mask.png?object=1&drop=100000")
    assert int(headers["x-area-change"]) == -want.sum()
    assert not np.asarray(Image.open(io.BytesIO(body))).any()
    for name, status in (("mask.png?object=2", 400), ("evil.html", 404), ("mask.png?object=x", 400)):
        assert client.ask("GET", f"/api/desks/{desk}/export/{name}")[0] == status


def test_a_given_mask_is_gone_on_from(client, tab):
    want = np.zeros((HEIGHT, WIDTH), np.uint8)
    want[20:60, 30:90] = 255
    path = f"/api/desks/{tab.state['desk']}/given?object=1"
    status, _, body = client.ask("POST", path, png(want), "image/png")
    assert (status, json.loads(body)) == (200, {"revision": 1})
    header, payload = tab.next()
    assert (header["revision"], header["object"]["rounds"], header["object"]["iou"]) == (1, 1, None)
    np.testing.assert_array_equal(mask_of(header, payload), want > 0)
    status, _, body = client.ask("POST", path, png(want[:9]), "image/png")
    assert (status, json.loads(body)["error"]["kind"]) == (400, "refused")


def test_masks_of_large_pictures_are_sampled_and_have_tiles():
    pyramid = InMemory(photo(60, 9000))
    cutting = Cutting(small_model(), pyramid, 64)
    whole = np.zeros((60, 9000), bool)
    whole[3:50, 4097:7000] = np.random.default_rng(0).random((47, 2903)) < 0.9
    cutting.apply({"do": "given", "object": 1, "rle": rle.encode(whole)})
    thing = cutting.objects[1]
    header, payload = messages.draw(thing, 7, 4096, 10**6)
    assert (header["step"], header["version"], header["object"]) == (4, 7, 1)
    assert header["x"] % 4 == header["y"] % 4 == 0
    x0, _, x1, y1 = thing.mask.bbox
    assert header["x"] <= x0 < header["x"] + 4
    shown = outline.decode(payload, header["height"], header["width"])
    np.testing.assert_array_equal(shown, whole[header["y"] : y1 : 4, header["x"] : x1 : 4])
    tile = np.asarray(Image.open(io.BytesIO(messages.mask_tile(thing.mask, 1, 4, 0, 512))))
    np.testing.assert_array_equal(tile, whole[0:60:2, 4096:5120:2])
    for level, col, row in ((0, 18, 0), (0, 0, 1), (-1, 0, 0), (40, 0, 0), (0, -1, 0)):
        with pytest.raises(ValueError, match="no such tile"):
            messages.mask_tile(thing.mask, level, col, row, 512)
    assert [messages.step_for(side, 4096) for side in (1, 4096, 4097, 8192, 8193, 30000)] == [1, 1, 2, 2, 4, 8]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 8), (64, 65), (300, 257)])
def test_a_png_holds_every_pixel(size):
    samples = np.random.default_rng(0).random(size) < 0.3
    image = Image.open(io.BytesIO(messages.png(samples)))
    assert (image.mode, image.format) == ("1", "PNG")
    np.testing.assert_array_equal(np.asarray(image), samples)


def test_mask_tiles_are_of_one_version(client, tab):
    tab.click(*CLICKS[0])
    header, payload = tab.click(*CLICKS[1])
    path = f"/api/desks/{tab.state['desk']}/masks/1"
    status, headers, body = client.ask("GET", f"{path}/2/0/0/0")
    assert (status, headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), mask_of(header, payload))
    assert client.ask("GET", f"{path}/1/0/0/0")[0] == 410
    assert client.ask("GET", f"{path}/2/0/1/0")[0] == 404


def test_the_port(monkeypatch):
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port} .*choose another --port"):
        listen("127.0.0.1", port)
    taken.close()
    first, second = listen("127.0.0.1", None), listen("127.0.0.1", None)
    assert 8321 <= first.getsockname()[1] < second.getsockname()[1] <= 8340
    first.close()
    second.close()


# ---------------------------------------------------------------- the picture first, then the encode


@pytest.mark.parametrize("then", ["shown", "click", "nothing"])
def test_the_encode_waits_until_the_page_shows_the_picture(make_site, then):
    from websockets.sync.client import connect

    site = make_site(first_frame_seconds=0.5 if then == "nothing" else 30)
    with serving(site) as url:
        client = Client(url)
        desk = client.desk()
        began = time.monotonic()
        with connect(
            f"ws://{client.host}/api/desks/{desk}/live?shows=1",
            origin=f"http://{client.host}",
            additional_headers={"Cookie": client.cookie},
        ) as socket:

            def heard(seconds=10):
                return messages.unpack(socket.recv(seconds))[0]

            assert heard()["event"] == "encoding"
            assert heard()["state"]["revision"] == 0
            with pytest.raises(TimeoutError):
                heard(0.2)
            assert not site.desks.find(desk, site.desks._list()[0].owner).encoded
            if then == "shown":
                socket.send(messages.SHOWN)
            if then == "click":
                command = {"do": "click", "object": 1, "x": 9, "y": 9, "positive": True}
                socket.send(json.dumps({"seq": 1, "revision": 0, "command": command}))
            assert heard()["event"] == "encoded"
            if then == "click":
                assert heard()["seq"] == 1
        assert 0.2 < time.monotonic() - began < 20


def test_who_has_no_page_does_not_wait(make_site):
    with serving(make_site(first_frame_seconds=30)) as url:
        client = Client(url)
        began = time.monotonic()
        client.open(client.desk()).close()
        assert time.monotonic() - began < 15


# ---------------------------------------------------------------- refining, in turns


@pytest.fixture
def refining(model, tmp_path, monkeypatch):
    """A site with a picture of which a refine sees twelve regions, all of which are believed."""
    monkeypatch.setattr(native, "_agrees", lambda *_: True)
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "large.png").write_bytes(png(photo(240, 320, 3)))
    site = Site(model, "small.test", [folder], tmp_path / "large_state", side=SIDE)
    with serving(site) as url:
        yield site, Client(url), open_pyramid(folder / "large.png")


GIVEN = np.zeros((240, 320), bool)
GIVEN[60:130, 60:250] = True
START = ({"do": "given", "object": 1, "rle": rle.encode(GIVEN)}, {"do": "refine", "object": 1})


def slowly(monkeypatch):
    """Each region waits for its leave; returns what gives so many, and the regions that were begun."""
    leave, begun = threading.Semaphore(0), []
    right = native._look

    def look(model, region, *rest):
        begun.append(region)
        assert leave.acquire(timeout=20)
        return right(model, region, *rest)

    monkeypatch.setattr(native, "_look", look)

    def until(count):
        end = time.monotonic() + 10
        while len(begun) < count:
            assert time.monotonic() < end
            time.sleep(0.002)

    return leave.release, until, begun


def test_a_refine_in_turns_gives_the_mask_of_one_in_one_go(refining, model):
    _, client, pyramid = refining
    tab, alone = client.open(client.desk()), Cutting(model, pyramid, SIDE)
    for command in (*START, {"do": "click", "object": 1, "x": 100, "y": 90, "positive": False}):
        header, code = tab.do(**command)
        alone.apply(command)
        assert code == messages.draw(alone.objects[1], 0, LIMITS.mask_side, LIMITS.mask_bytes)[1]
        assert header["object"]["area"] == alone.objects[1].mask.area
    told = [(event["done"], event["of"]) for event in tab.events if event["event"] == "refining"]
    assert told  # some may be left out when they come too fast
    assert {of for _, of in told} == {12}
    assert told == sorted(told)
    tab.close()


def test_another_session_is_answered_while_one_refines(refining, monkeypatch):
    _, client, _ = refining
    one, two = client.open(client.desk()), client.open(client.desk())
    one.do(**START[0])
    give, until, begun = slowly(monkeypatch)
    seq = one.send(**START[1])
    for count in range(1, 6):
        until(count)
        sent = two.send(do="click", object=1, x=20 * count, y=30, positive=True)
        time.sleep(0.05)  # until it waits
        give()
        assert two.answer(sent)[0]["object"]["rounds"] == count
        assert len(begun) <= count + 1  # at most one region further
    give(20)
    header, _ = one.answer(seq)
    assert header["object"]["rounds"] == 2
    assert len(begun) == 12
    assert [(event["done"], event["of"]) for event in one.events if event["event"] == "refining"][:5] == [
        (done, 12) for done in range(5)
    ]
    assert not any(event["event"] == "refining" for event in two.events)
    one.close()
    two.close()


@pytest.mark.parametrize("by", ["undo", "click", "given", "refine", "clear", "remove"])
def test_a_refine_that_is_taken_back_leaves_the_mask_before(refining, monkeypatch, by):
    site, client, _ = refining
    tab = client.open(client.desk())
    tab.do(do="add")
    before = tab.do(**START[0])
    give, until, begun = slowly(monkeypatch)
    refine = tab.send(**START[1])
    until(1)
    give()
    until(2)
    more = {"click": {"x": 100.0, "y": 90.0, "positive": True}, "given": {"rle": rle.encode(~GIVEN)}}
    then = tab.send(do=by, object=1, **more.get(by, {}))
    time.sleep(0.05)
    give(20)
    assert kind(tab.answer(refine)) == "superseded"
    header, code = tab.answer(then)
    if by == "undo":
        assert (header["unchanged"], header["object"]["rounds"], header["revision"], code) == (True, 1, 2, before[1])
        assert len(begun) == 2
    elif by == "remove":
        assert header["removed"] == 1
    else:
        assert (header["revision"], header["object"]["rounds"]) == (3, 0 if by == "clear" else 2)
    journal = read_journal(site.desks.path(tab.state["desk"]))[1]
    assert [command["do"] for command in journal] == ["add", "given"] + ([] if by == "undo" else [by])
    tab.close()


def test_who_connects_while_it_is_refined_need_not_wait(refining, monkeypatch):
    _, client, _ = refining
    desk = client.desk()
    tab = client.open(desk)
    tab.do(**START[0])
    give, until, _ = slowly(monkeypatch)
    tab.send(**START[1])
    until(1)
    threading.Timer(0.1, give).start()
    again = client.open(desk)  # within one region's time
    assert again.state["objects"][0]["rounds"] == 1
    tab.close()  # who asked goes away: the refine is done all the same
    give(20)
    header, _ = again.next()
    assert (header["object"]["rounds"], header["revision"]) == (2, 2)
    again.close()


def test_a_desk_that_is_put_to_sleep_while_it_is_refined_begins_anew(refining, monkeypatch, model):
    site, client, pyramid = refining
    tab, alone = client.open(client.desk()), Cutting(model, pyramid, SIDE)
    for command in START:
        alone.apply(command)
    tab.do(**START[0])
    give, until, begun = slowly(monkeypatch)
    seq = tab.send(**START[1])
    give()
    until(2)
    asleep = site.engine.submit("other", Work(site.desks.do_relieve))
    give(30)
    asleep.result(10)
    header, code = tab.answer(seq)
    assert (header["revision"], header["object"]["rounds"]) == (2, 2)
    assert code == messages.draw(alone.objects[1], 0, LIMITS.mask_side, LIMITS.mask_bytes)[1]
    assert len(begun) == 12 + 2
    tab.close()
