"""Commands on one picture: the same masks as a session's, refused ones change nothing, logs can be played again."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrsam import cutting as cutting_module
from hrsam import rle
from hrsam.clicks import Click
from hrsam.cutting import COLOURS, Cutting, parse_command
from hrsam.pyramid import InMemory
from hrsam.session import Session, encode_picture
from tests.builders import photo, small_model

HEIGHT, WIDTH, SIDE = 90, 120, 64
PIXELS = photo(HEIGHT, WIDTH)
GIVEN = np.zeros((HEIGHT, WIDTH), bool)
GIVEN[20:60, 30:90] = True


def click(object, x, y, positive=True):
    return {"do": "click", "object": object, "x": x, "y": y, "positive": positive}


def box(object, *corners):
    return {"do": "box", "object": object, **dict(zip(("x0", "y0", "x1", "y1"), corners))}


def given_mask(object):
    return {"do": "given", "object": object, "rle": rle.encode(GIVEN)}


def do(name, object=1):
    return {"do": name, "object": object}


def one_sentence(err):
    return "\n" not in str(err) and len(str(err)) < 300


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def encoded(model):
    return encode_picture(model, PIXELS, SIDE)


@pytest.fixture
def cutting(model, encoded):
    return Cutting(model, InMemory(PIXELS), SIDE, encoded)


def seen(cutting):
    """All that a caller can see, and what undo and redo would bring."""
    return (
        cutting.revision,
        cutting.log,
        [
            (
                t.id,
                t.name,
                t.colour,
                t.rounds,
                t.clicks,
                t.box,
                str(t.iou),
                t.mask.rle(),
                t.history.rounds,
                t.history.undone,
            )
            for t in cutting.objects.values()
        ],
    )


ANYWHERE = st.integers(-10, 130)
COMMANDS = st.one_of(
    st.builds(click, st.integers(1, 3), ANYWHERE, ANYWHERE, st.booleans()),
    st.builds(box, st.integers(1, 3), ANYWHERE, ANYWHERE, ANYWHERE, ANYWHERE),
    st.builds(do, st.sampled_from(["undo", "redo", "clear", "remove", "refine"]), st.integers(1, 3)),
    st.builds(do, st.sampled_from(["undo", "redo"]), st.integers(1, 2)),
    st.builds(given_mask, st.integers(1, 2)),
    st.just({"do": "add"}),
    st.builds(lambda object: {"do": "describe", "object": object, "name": "cup"}, st.integers(1, 3)),
)


def follow(sessions, command, new):
    """The same command to plain sessions, one an object."""
    kind = command["do"]
    if kind == "add":
        sessions[max(sessions, default=0) + 1] = new()
        return
    session = sessions[command["object"]]
    if kind == "click":
        session.click(command["x"], command["y"], command["positive"])
    elif kind == "box":
        session.box(command["x0"], command["y0"], command["x1"], command["y1"])
    elif kind == "given":
        session.refine(GIVEN)
    elif kind in ("undo", "redo", "clear"):
        getattr(session, kind)()


@settings(max_examples=60, deadline=None)
@given(commands=st.lists(COMMANDS.filter(lambda c: c["do"] not in ("refine", "remove")), min_size=1, max_size=10))
def test_any_commands_give_the_masks_of_plain_sessions(model, encoded, commands):
    cutting = Cutting(model, InMemory(PIXELS), SIDE, encoded)

    def new():
        session = Session(model, SIDE)
        session.set_picture(encoded)
        return session

    sessions = {1: new()}
    for command in commands:
        before = seen(cutting)
        try:
            changed = cutting.apply(command)
        except ValueError:
            assert seen(cutting) == before
            with pytest.raises((ValueError, KeyError)):
                follow(sessions, command, new)
            continue
        follow(sessions, command, new)
        assert cutting.revision == before[0] + 1
        assert cutting.log[-1].record() == command
        assert changed == command.get("object", max(sessions))
        assert cutting.objects.keys() == sessions.keys()
        for id, session in sessions.items():
            thing = cutting.objects[id]
            mask = thing.mask.array()
            assert mask.tobytes() == session.mask.tobytes()
            assert thing.rounds == len(session.rounds)
            assert thing.clicks == (session.rounds[-1].clicks if session.rounds else ())


@settings(max_examples=25, deadline=None)
@given(commands=st.lists(COMMANDS, min_size=1, max_size=12))
def test_any_log_played_again_gives_the_same_bytes(model, commands):
    cutting = Cutting(model, InMemory(PIXELS), SIDE)
    for command in commands:
        before = seen(cutting)
        try:
            cutting.apply(command)
        except ValueError:
            assert seen(cutting) == before
    again = Cutting(model, InMemory(PIXELS), SIDE)
    for command in json.loads(json.dumps([command.record() for command in cutting.log])):
        again.apply(command)
    assert (again.revision, again.log) == (cutting.revision, cutting.log)
    for one, other in zip(seen(again)[2], seen(cutting)[2], strict=True):
        assert one[:8] == other[:8]  # the rounds behind them are not the same ones


@settings(max_examples=25, deadline=None)
@given(st.lists(COMMANDS, min_size=1, max_size=8), st.integers(1, 8))
def test_undo_n_then_redo_n_is_identity(model, encoded, commands, n):
    cutting = Cutting(model, InMemory(PIXELS), SIDE, encoded)
    for command in commands:
        try:
            cutting.apply(command)
        except ValueError:
            continue
    for id in list(cutting.objects):
        n = min(n, cutting.objects[id].rounds)
        before = seen(cutting)[2]
        for name in ["undo"] * n + ["redo"] * n:
            cutting.apply(do(name, id))
        assert seen(cutting)[2] == before


def test_windows_tile_to_the_whole(cutting):
    cutting.apply(click(1, 30, 40))
    mask = cutting.objects[1].mask
    whole = np.concatenate(
        [
            np.concatenate(
                [mask.window(x, y, min(x + 50, WIDTH), min(y + 50, HEIGHT)) for x in range(0, WIDTH, 50)], axis=1
            )
            for y in range(0, HEIGHT, 50)
        ]
    )
    np.testing.assert_array_equal(whole, cutting.objects[1].history.last.prediction.mask)
    assert (mask.area, 0 < mask.area < whole.size) == (whole.sum(), True)


def test_a_new_cutting(cutting):
    assert (cutting.revision, cutting.log, list(cutting.objects)) == (0, (), [1])
    thing = cutting.objects[1]
    assert (thing.name, thing.colour, thing.rounds, thing.clicks, thing.box) == ("object 1", COLOURS[0], 0, (), None)
    assert (thing.can_undo, thing.can_redo, thing.mask.area, thing.seconds) == (False, False, 0, 0)
    assert math.isnan(thing.iou)


def test_objects_have_names_colours_and_numbers_of_their_own(cutting):
    assert cutting.apply({"do": "add", "name": "cup", "colour": "#A0b1C2"}) == 2
    assert cutting.apply({"do": "add"}) == 3
    assert [(t.id, t.name, t.colour) for t in cutting.objects.values()] == [
        (1, "object 1", COLOURS[0]),
        (2, "cup", "#A0b1C2"),
        (3, "object 3", COLOURS[2]),
    ]
    cutting.apply({"do": "describe", "object": 2, "name": "saucer"})
    cutting.apply({"do": "describe", "object": 2, "colour": "#000000"})
    assert (cutting.objects[2].name, cutting.objects[2].colour) == ("saucer", "#000000")
    assert cutting.apply(do("remove", 3)) == 3
    assert cutting.apply({"do": "add"}) == 4  # a number is never used again
    for id in (1, 2, 4):
        cutting.apply(do("remove", id))
    assert dict(cutting.objects) == {}
    assert cutting.apply({"do": "add"}) == 5


def test_objects_do_not_touch_each_other_and_old_ones_do_not_change(cutting):
    cutting.apply(click(1, 30, 40))
    cutting.apply({"do": "add"})
    old = cutting.objects
    mask = old[1].mask
    cutting.apply(click(2, 80, 60))
    assert cutting.objects[1] is old[1]
    assert old[2].rounds == 0
    cutting.apply(click(1, 90, 80, False))
    assert old[1].mask is mask
    assert cutting.objects[1].clicks == (Click(30, 40), Click(90, 80, False))
    cutting.apply(do("undo"))
    assert cutting.objects[1].mask.rle() == mask.rle()
    with pytest.raises(TypeError):
        cutting.objects[3] = old[1]


@pytest.mark.parametrize(
    "command", [do("clear"), click(1, 50, 40), box(1, 0, 0, 50, 50), given_mask(1)], ids=lambda c: c["do"]
)
def test_what_was_undone_is_gone_after_something_new(cutting, command):
    cutting.apply(click(1, 30, 40))
    cutting.apply(click(1, 60, 40))
    cutting.apply(do("undo"))
    assert cutting.objects[1].can_redo
    cutting.apply(command)
    assert not cutting.objects[1].can_redo
    with pytest.raises(ValueError, match="nothing to redo"):
        cutting.apply(do("redo"))


def test_the_picture_is_encoded_when_needed_and_again_when_dropped(model):
    cutting = Cutting(model, InMemory(PIXELS), SIDE)
    cutting.apply({"do": "add"})
    cutting.apply(given_mask(1))
    assert cutting.picture is None
    cutting.apply(click(1, 30, 40))
    first = cutting.picture
    assert first is not None
    assert cutting.encode() == 0
    mask = cutting.objects[1].mask.rle()
    cutting.picture = None
    cutting.apply(do("undo"))
    assert cutting.picture is None
    cutting.apply(click(1, 30, 40))
    assert cutting.objects[1].mask.rle() == mask
    assert cutting.picture is not first


def test_what_a_model_sees_of_a_huge_picture_is_the_overview(model):
    class Huge(InMemory):
        def overview(self, side):
            assert side == SIDE
            return np.ascontiguousarray(small)

    small = photo(48, 64, seed=3)
    cutting = Cutting(model, Huge(PIXELS), SIDE)
    cutting.apply(click(1, 30, 40))
    want = encode_picture(model, small, SIDE)
    assert (cutting.picture.embedding.features == want.embedding.features).all()
    assert cutting.picture.frame == cutting.frame


def test_lack_of_memory_changes_nothing(cutting, monkeypatch):
    cutting.apply(click(1, 30, 40))
    before = seen(cutting)

    def exhausted(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("hrsam.session.predict_masks", exhausted)
        with pytest.raises(MemoryError):
            cutting.apply(click(1, 50, 40))
    assert seen(cutting) == before
    with monkeypatch.context() as patch:  # the decode went well, the mask does not fit
        patch.setattr("hrsam.session.Mask.scan", exhausted)
        with pytest.raises(MemoryError):
            cutting.apply(click(1, 50, 40))
    assert seen(cutting) == before
    with monkeypatch.context() as patch:
        patch.setattr(cutting_module, "encode_picture", exhausted)
        cutting.picture = None
        with pytest.raises(MemoryError):
            cutting.apply(click(1, 50, 40))
    assert seen(cutting) == before
    cutting.apply(click(1, 50, 40))


def test_rounds_and_objects_are_limited(cutting, monkeypatch):
    monkeypatch.setattr(cutting_module, "MAX_ROUNDS", 2)
    monkeypatch.setattr(cutting_module, "MAX_OBJECTS", 2)
    for _ in range(2):
        cutting.apply(click(1, 30, 40))
    for command in (click(1, 30, 40), box(1, 0, 0, 9, 9), given_mask(1), do("refine")):
        with pytest.raises(ValueError, match="may have 2 rounds; undo some or clear it"):
            cutting.apply(command)
    cutting.apply(do("undo"))
    cutting.apply(click(1, 30, 40))
    cutting.apply({"do": "add"})
    with pytest.raises(ValueError, match="may have 2 objects at a time"):
        cutting.apply({"do": "add"})


BAD = [
    (None, "got NoneType"),
    ("undo", "got str"),
    ([], "got list"),
    ({}, "there is no command None; known are click, box, given, refine"),
    ({"do": "format"}, "there is no command 'format'"),
    ({"do": ["click"]}, "there is no command"),
    ({"do": "x" * 10_000}, "there is no command 'xx"),
    (do("undo", None), "object"),
    (do("undo", "1"), "object"),
    (do("undo", 1.0), "object"),
    (do("undo", True), "object"),
    (do("undo", 0), "object"),
    (do("undo", 2), "there is no object 2"),
    (do("undo", 10**30), "there is no object 1000"),
    ({"do": "undo"}, "object: Field required"),
    ({**do("undo"), "also": 1}, "also: Extra"),
    (do("undo"), "nothing to undo"),
    (do("redo"), "nothing to redo"),
    (click(1, "3", 4), "x: "),
    (click(1, True, 4), "x: "),
    (click(1, None, 4), "x: "),
    (click(1, float("nan"), 4), "x: .*finite"),
    (click(1, 4, float("inf")), "y: .*finite"),
    (click(1, 10**400, 4), "x: "),
    (click(1, 3, 4, 1), "positive: "),
    (click(1, 120, 4), "outside the picture of 120 x 90"),
    (box(1, 10, 10, 10, 20), "x0 < x1"),
    (box(1, 10, 10, 20), "y1: Field required"),
    (box(1, 200, 200, 300, 300), "lies outside the picture"),
    (
        {"do": "given", "object": 1, "rle": {"size": [2, 2], "counts": "04"}},
        "the mask must be 90x120 as the picture; got 2x2",
    ),
    ({"do": "given", "object": 1, "rle": {"size": [90, 120], "counts": "04"}}, "add up to 4"),
    ({"do": "given", "object": 1, "rle": {"size": [90, 120], "counts": "~"}}, "characters outside"),
    ({"do": "given", "object": 1, "rle": {"size": [90], "counts": ""}}, "rle.size"),
    ({"do": "given", "object": 1, "rle": {"size": [90, 120], "counts": [10800]}}, "rle.counts"),
    ({"do": "given", "object": 1, "rle": "04"}, "rle"),
    (do("refine"), "there is no mask to refine"),
    ({"do": "add", "name": ""}, "name"),
    ({"do": "add", "name": "  "}, "not blank"),
    ({"do": "add", "name": "a\nb"}, "one line"),
    ({"do": "add", "name": "\ud800"}, "one line|unicode|string"),
    ({"do": "add", "name": "x" * 101}, "name"),
    ({"do": "add", "name": 3}, "name"),
    ({"do": "add", "colour": "red"}, "colour is #rrggbb"),
    ({"do": "add", "colour": "#12345"}, "colour is #rrggbb"),
    ({"do": "add", "colour": "#1234567"}, "colour is #rrggbb"),
    ({"do": "add", "object": 1}, "object: Extra"),
    ({"do": "describe", "object": 1}, "give a name or a colour"),
    ({"do": "describe", "object": 7, "name": "cup"}, "there is no object 7"),
    ({3: 4, "do": "undo"}, "."),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_refused_in_one_sentence(cutting, value, message):
    before = seen(cutting)
    with pytest.raises(ValueError, match=message) as caught:
        cutting.apply(value)
    assert one_sentence(caught.value)
    assert seen(cutting) == before


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["click", "object", "do"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["do", "object", "x", "rle", "name"]), inner)
        ),
        max_leaves=5,
    )
)
def test_anything_is_a_command_or_one_sentence(value):
    refused = None
    try:
        command = parse_command(value)
    except ValueError as err:
        refused = err
    if refused is not None:
        assert one_sentence(refused)
    else:
        assert parse_command(json.loads(json.dumps(command.record()))) == command


def test_commands_have_one_form():
    for value in (click(1, 12.5, 3), box(2, 0.5, 1, 2, 3), given_mask(1), do("undo"), {"do": "add", "name": "Ä ñ 猫"}):
        command = parse_command(value)
        assert command.record() == value
        assert parse_command(command) is command
        with pytest.raises(ValueError, match="frozen"):
            command.do = "clear"
    assert parse_command({"do": "click", "object": 1, "x": 1, "y": 2}).record()["positive"] is True
