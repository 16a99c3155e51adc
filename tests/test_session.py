"""One picture and its rounds: what is kept, what is refused, and that nothing else is touched."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hrsam.clicks import Click
from hrsam.models.model import HRSAM
from hrsam.session import EncodedPicture, History, Session, check_box, encode_picture, parse_box, predict_masks
from tests.builders import photo, small_config, small_model

HEIGHT, WIDTH = 90, 120
PIXELS = photo(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def encoded(model):
    return encode_picture(model, PIXELS, side=128)


@pytest.fixture
def session(model, encoded):
    session = Session(model, side=128)
    session.set_picture(encoded)
    return session


def kept(session):
    """Everything a caller can see of a session."""
    return session.picture, session.rounds, session.mask.tobytes()


def test_set_image_encodes_and_forgets(model, session):
    session.click(30, 40)
    picture = session.set_image(PIXELS)
    assert isinstance(picture, EncodedPicture)
    assert picture is session.picture
    assert picture.embedding.grid == (8, 8)
    assert (picture.frame.height, picture.frame.width) == (HEIGHT, WIDTH)
    assert picture.seconds > 0
    assert session.rounds == ()
    assert not session.mask.any()
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()


def test_a_click_answers_at_the_size_of_the_picture(session):
    prediction = session.click(30, 40)
    assert prediction.mask.shape == (HEIGHT, WIDTH)
    assert prediction.mask.dtype == bool
    assert 0 < prediction.mask.mean() < 1
    np.testing.assert_array_equal(prediction.mask, prediction.logits > 0)
    assert prediction.low_res.shape == (32, 32)
    assert 0 < prediction.iou < 1
    assert session.mask is prediction.mask
    assert session.rounds[-1].clicks == (Click(30, 40, True),)


def test_rounds_hold_the_whole_prompt_so_far(session):
    session.box(10, 5, 60, 70)
    session.click(30, 40)
    session.click(100, 80, positive=False)
    session.box(20, 5, 70, 70)
    first, second, third, fourth = session.rounds
    assert first.clicks == ()
    assert second.clicks == (Click(30, 40),)
    assert third.clicks == fourth.clicks == (Click(30, 40), Click(100, 80, False))
    assert first.box == second.box == third.box == (10, 5, 60, 70)
    assert fourth.box == (20, 5, 70, 70)


def test_a_round_is_computed_from_all_clicks_the_box_and_the_logits_before(model, encoded, session):
    session.click(30, 40)
    session.box(10, 5, 60, 70)
    session.click(100, 80, positive=False)
    before, last = session.rounds[-2:]
    want = predict_masks(model, encoded, last.clicks, last.box, before.prediction.low_res)[0]
    assert torch.equal(last.prediction.low_res, want.low_res)
    for clicks, box, previous in (
        (last.clicks[1:], last.box, before.prediction.low_res),
        (last.clicks, None, before.prediction.low_res),
        (last.clicks, last.box, None),
        ((Click(30, 40), Click(100, 80)), last.box, before.prediction.low_res),
    ):
        other = predict_masks(model, encoded, clicks, box, previous)[0]
        assert (last.prediction.low_res - other.low_res).abs().max() > 1e-4


def test_undo_and_redo_give_back_the_very_rounds(session):
    for x in (20, 50, 80):
        session.click(x, 40)
    rounds = session.rounds
    assert session.undo() is rounds[1]
    assert session.undo() is rounds[0]
    assert session.mask is rounds[0].mask
    assert session.undo() is None
    assert not session.mask.any()
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    assert [session.redo() for _ in range(3)] == list(rounds)
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()
    assert session.rounds == rounds


def test_masks_are_kept_as_runs_too(session):
    given = np.zeros((HEIGHT, WIDTH), bool)
    given[20:60, 30:90] = True
    session.click(20, 40)
    session.refine(given)
    for played in session.rounds:
        np.testing.assert_array_equal(played.runs.array(), played.mask)
        assert played.runs.area == played.mask.sum()


def test_a_history_does_not_change(model, encoded):
    start = History()
    one = start.click(model, encoded, Click(20, 40))
    two = one.box(model, encoded, (10, 5, 60, 70))
    assert (start.rounds, len(one.rounds), len(two.rounds)) == ((), 1, 2)
    assert two.undo().redo().rounds == two.rounds
    assert two.undo().undone == (two.last,)
    assert two.undo().click(model, encoded, Click(50, 40)).undone == ()
    assert two.rounds[0] is one.last
    assert start.last is None


def test_a_picture_resized_before_is_encoded_for_its_original(model):
    small = photo(48, 64)
    picture = encode_picture(model, small, 64, size=(9000, 12_000))
    assert (picture.frame.height, picture.frame.width) == (9000, 12_000)
    assert torch.equal(picture.embedding.features, encode_picture(model, small, 64).embedding.features)
    with pytest.raises(ValueError, match="this frame is for uint8"):
        encode_picture(model, small, 64, size=(12_000, 9000))


def test_a_click_after_undo_starts_from_there_and_ends_redo(model, encoded, session):
    session.click(20, 40)
    session.click(50, 40)
    session.undo()
    session.click(80, 40, positive=False)
    assert session.rounds[-1].clicks == (Click(20, 40), Click(80, 40, False))
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()
    other = Session(model)
    other.set_picture(encoded)
    other.click(20, 40)
    other.click(80, 40, positive=False)
    assert torch.equal(session.rounds[-1].prediction.low_res, other.rounds[-1].prediction.low_res)


def test_clear_keeps_the_picture(encoded, session):
    session.click(20, 40)
    session.undo()
    session.click(30, 40)
    session.clear()
    assert kept(session) == (encoded, (), np.zeros((HEIGHT, WIDTH), bool).tobytes())
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()


def test_refine_starts_from_the_given_mask(session):
    given = np.zeros((HEIGHT, WIDTH), bool)
    given[20:60, 30:90] = True
    session.click(20, 40)
    session.refine(given)
    np.testing.assert_array_equal(session.mask, given)
    given[:] = False  # the caller's array stays the caller's
    assert session.mask.sum() == 40 * 60
    start = session.rounds[-1].prediction.low_res
    assert start.shape == (32, 32)
    assert start[10, 16] == 8  # inside
    assert start[28, 2] == -8  # outside, and below the picture
    refined = session.click(70, 30)
    assert session.rounds[-1].clicks == (Click(20, 40), Click(70, 30))
    session.clear()
    session.click(20, 40)
    assert not torch.equal(session.click(70, 30).low_res, refined.low_res)
    session.refine(np.zeros((HEIGHT, WIDTH), np.uint8))
    assert not session.mask.any()


def test_refine_refuses_other_sizes(session):
    session.click(20, 40)
    before = kept(session)
    with pytest.raises(ValueError, match=r"the mask must be 90x120 .* got shape \(120, 90\)"):
        session.refine(np.zeros((WIDTH, HEIGHT), bool))
    assert kept(session) == before


def test_rounds_cannot_be_changed(session):
    prediction = session.click(20, 40)
    with pytest.raises(AttributeError):
        prediction.iou = 1.0
    with pytest.raises(AttributeError):
        session.rounds[0].clicks = ()
    for array in (prediction.mask, prediction.logits, session.mask):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
        np.zeros((0, 10, 3), np.uint8),
        torch.zeros(10, 10, 3, dtype=torch.uint8),
        "photo.jpg",
        None,
    ],
    ids=lambda p: f"{p.dtype}{tuple(p.shape)}" if hasattr(p, "shape") else str(p),
)
def test_a_refused_picture_changes_nothing(session, pixels):
    session.click(20, 40)
    session.click(50, 40)
    session.undo()
    before = kept(session)
    with pytest.raises(ValueError, match="picture"):
        session.set_image(pixels)
    assert kept(session) == before
    assert session.redo().clicks[-1] == Click(50, 40)


@pytest.mark.parametrize(
    ("x", "y", "positive", "message"),
    [
        (120, 40, True, r"\(120, 40\) is outside the picture of 120 x 90"),
        (119.5, 40, True, "outside"),
        (-0.51, 40, True, "outside"),
        (20, 90, True, "outside"),
        (20, -1, True, "outside"),
        (1e300, 40, True, "outside"),
        (float("nan"), 40, True, "finite"),
        (20, float("inf"), True, "finite"),
        ("20", 40, True, "finite number"),
        (None, 40, True, "finite number"),
        (20, 40, 2, "label must be 1 .* or 0"),
        (20, 40, -1, "label must be 1 .* or 0"),
        (20, 40, None, "label must be 1 .* or 0"),
        (20, 40, "positive", "label must be 1 .* or 0"),
    ],
)
def test_a_refused_click_changes_nothing(session, x, y, positive, message):
    session.click(20, 40)
    before = kept(session)
    with pytest.raises(ValueError, match=message):
        session.click(x, y, positive)
    assert kept(session) == before


@pytest.mark.parametrize("corner", [(-0.5, -0.5), (119.49, 89.49), (0, 89), (119, 0)])
def test_every_pixel_can_be_clicked(session, corner):
    assert session.click(*corner).mask.shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((50, 10, 20, 60), "x0 < x1 and y0 < y1"),
        ((20, 10, 20, 60), "x0 < x1 and y0 < y1"),
        ((20, 60, 50, 10), "x0 < x1 and y0 < y1"),
        ((float("nan"), 10, 20, 60), "four finite numbers"),
        ((10, 10, float("inf"), 60), "four finite numbers"),
        ((130, 10, 140, 60), "lies outside the picture of 120x90"),
        ((10, -20, 20, -1), "lies outside"),
    ],
)
def test_a_refused_box_changes_nothing(session, box, message):
    session.click(20, 40)
    before = kept(session)
    with pytest.raises(ValueError, match=message):
        session.box(*box)
    assert kept(session) == before


def test_a_box_is_cut_to_the_picture(session):
    assert check_box((-50, 10, 500, 60), HEIGHT, WIDTH) == (-0.5, 10, 119.5, 60)
    session.box(-50, 10, 500, 60)
    assert session.rounds[-1].box == (-0.5, 10, 119.5, 60)
    with pytest.raises(ValueError, match="four finite numbers"):
        check_box((1, 2, 3), HEIGHT, WIDTH)


def test_parse_box():
    assert parse_box(" 1,2.5, 30,4e1") == (1, 2.5, 30, 40)
    for text in ("", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1;2;3;4"):
        with pytest.raises(ValueError, match="a box is X0,Y0,X1,Y1"):
            parse_box(text)


def test_nothing_works_before_a_picture_is_set(model):
    session = Session(model)
    for action in (
        lambda: session.click(1, 2),
        lambda: session.box(1, 2, 3, 4),
        lambda: session.refine(np.zeros((2, 2), bool)),
        lambda: session.mask,
        lambda: session.picture,
    ):
        with pytest.raises(ValueError, match="no picture is set; call set_image first"):
            action()


def test_an_empty_prompt_is_refused(model, encoded):
    with pytest.raises(ValueError, match="empty prompt"):
        predict_masks(model, encoded)


def test_replay_is_identical(model):
    def play():
        session = Session(model, side=128)
        session.set_image(PIXELS)
        session.box(10, 5, 100, 70)
        for x, y, positive in ((30, 40, True), (100, 80, False), (64.25, 12.5, True)):
            session.click(x, y, positive)
        return session.rounds

    for a, b in zip(play(), play(), strict=True):
        assert torch.equal(a.prediction.low_res, b.prediction.low_res)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.prediction.iou == b.prediction.iou


def test_two_sessions_on_one_model_do_not_touch_each_other(model):
    def alone(pixels, clicks, side):
        session = Session(model, side)
        session.set_image(pixels)
        return [session.click(*click).low_res for click in clicks]

    jobs = [(photo(90, 120, seed), [(20 + seed, 40), (70, 30, False), (5, 80)], 64 + 32 * seed) for seed in range(3)]
    wanted = [alone(*job) for job in jobs]
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    sessions = [Session(model, side) for _, _, side in jobs]
    for session, (pixels, _, _) in zip(sessions, jobs):
        session.set_image(pixels)
    for turn in range(3):
        for session, (_, clicks, _), want in zip(sessions, jobs, wanted):
            assert torch.equal(session.click(*clicks[turn]).low_res, want[turn])

    got = [None] * len(jobs)
    threads = [
        threading.Thread(target=lambda i=i, job=job: got.__setitem__(i, alone(*job))) for i, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for some, want in zip(got, wanted):
        assert all(torch.equal(a, b) for a, b in zip(some, want))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_session_on_an_encoder_alone_says_so():
    model = HRSAM(replace(small_config(), decoder=False)).eval()
    session = Session(model, side=64)
    session.set_image(PIXELS)
    with pytest.raises(ValueError, match="--encoder-only"):
        session.click(20, 40)
