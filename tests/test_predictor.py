"""SAM's face: its signature, shapes and errors, and the same answers as a session gives."""

import inspect

import numpy as np
import pytest
import torch

from hrsam.clicks import Click
from hrsam.frame import Frame
from hrsam.models.model import Embedding
from hrsam.predictor import Predictor
from hrsam.session import EncodedPicture, Session, predict_masks
from tests.builders import photo, small_model

HEIGHT, WIDTH = 90, 120
PIXELS = photo(HEIGHT, WIDTH)
POINTS, LABELS = np.array([[30, 40], [100, 80]]), np.array([1, 0])


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def predictor(model):
    """With a picture, which no test changes."""
    predictor = Predictor(model, side=128)
    predictor.set_image(PIXELS)
    return predictor


def test_signatures_are_those_of_sam():
    def signature(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()][1:]

    none = inspect.Parameter.empty
    assert signature(Predictor.set_image) == [("image", none), ("image_format", "RGB")]
    assert signature(Predictor.predict) == [
        ("point_coords", None),
        ("point_labels", None),
        ("box", None),
        ("mask_input", None),
        ("multimask_output", True),
        ("return_logits", False),
    ]
    assert signature(Predictor.reset_image) == signature(Predictor.get_image_embedding) == []
    assert isinstance(Predictor.device, property)


@pytest.mark.parametrize(("multimask", "count"), [(True, 3), (False, 1)])
def test_shapes_and_types(predictor, multimask, count):
    masks, scores, low_res = predictor.predict(POINTS, LABELS, multimask_output=multimask)
    assert masks.shape == (count, HEIGHT, WIDTH)
    assert masks.dtype == bool
    assert scores.shape == (count,)
    assert scores.dtype == np.float32
    assert low_res.shape == (count, 32, 32)
    assert low_res.dtype == np.float32
    logits, same_scores, same_low_res = predictor.predict(
        POINTS, LABELS, multimask_output=multimask, return_logits=True
    )
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits > 0, masks)
    np.testing.assert_array_equal(scores, same_scores)
    np.testing.assert_array_equal(low_res, same_low_res)
    masks[:] = False  # the caller's own


def test_guesses_are_the_decoders_masks_1_to_3_and_the_single_answer_is_mask_0(model, predictor):
    frame = Frame(HEIGHT, WIDTH, 128)
    picture = EncodedPicture(frame, predictor.set_image(PIXELS), 0.0)
    every = predict_masks(model, picture, [Click(30, 40), Click(100, 80, False)], masks=(0, 1, 2, 3))
    every = [p.low_res.numpy() for p in every]
    assert len({logits.tobytes() for logits in every}) == 4
    for multimask, wanted in ((True, every[1:]), (False, every[:1])):
        np.testing.assert_allclose(predictor.predict(POINTS, LABELS, multimask_output=multimask)[2], wanted, atol=1e-5)


def test_answers_are_those_of_a_session(model, predictor):
    session = Session(model, side=128)
    session.set_image(PIXELS)
    session.box(10, 5, 60, 70)
    first = session.click(30, 40)
    second = session.click(100, 80, positive=False)
    masks, scores, low_res = predictor.predict(
        POINTS, LABELS, np.array([10, 5, 60, 70]), first.low_res.numpy()[None], multimask_output=False
    )
    np.testing.assert_array_equal(low_res[0], second.low_res.numpy())
    np.testing.assert_array_equal(masks[0], second.mask)
    assert scores[0] == np.float32(second.iou)


def test_each_part_of_the_prompt_counts(predictor):
    box, earlier = np.array([10, 5, 60, 70]), predictor.predict(POINTS, LABELS, multimask_output=False)[2]
    prompts = [
        {"point_coords": POINTS, "point_labels": LABELS},
        {"point_coords": POINTS, "point_labels": 1 - LABELS},
        {"point_coords": POINTS[:, ::-1] / 2, "point_labels": LABELS},
        {"box": box},
        {"box": box[None]},
        {"mask_input": earlier},
        {"mask_input": -10 * earlier},
        {"point_coords": POINTS, "point_labels": LABELS, "box": box, "mask_input": earlier},
    ]
    got = [predictor.predict(**prompt, multimask_output=False)[2][0] for prompt in prompts]
    np.testing.assert_array_equal(got[3], got[4])
    del got[4]
    for i, one in enumerate(got):
        for other in got[:i]:
            assert np.abs(one - other).max() > 1e-4


def test_no_points_are_as_good_as_none(predictor):
    box = np.array([10, 5, 60, 70])
    empty = predictor.predict(np.zeros((0, 2)), np.zeros(0), box)[2]
    np.testing.assert_array_equal(predictor.predict(box=box)[2], empty)


def test_set_image_returns_the_embedding(model):
    predictor = Predictor(model, side=128)
    assert not predictor.is_image_set
    embedding = predictor.set_image(PIXELS)
    assert predictor.is_image_set
    assert isinstance(embedding, Embedding)
    assert embedding.features.shape == (1, 256, 8, 8)
    assert predictor.get_image_embedding() is embedding.features
    assert predictor.device == torch.device("cpu")
    predictor.reset_image()
    assert not predictor.is_image_set


def test_bgr_is_the_same_picture(model, predictor):
    other = Predictor(model, side=128)
    other.set_image(PIXELS[:, :, ::-1], image_format="BGR")
    assert torch.equal(other.get_image_embedding(), predictor.get_image_embedding())
    other.set_image(PIXELS[:, :, ::-1])
    assert not torch.equal(other.get_image_embedding(), predictor.get_image_embedding())


def test_a_model_trained_on_bgr_sees_blue_first(model):
    swapped = Predictor(small_model(), side=128)
    swapped.model.config = type(model.config)("test", model.config.encoder, bgr=True)
    straight = Predictor(model, side=128)
    swapped.set_image(PIXELS)
    straight.set_image(PIXELS, image_format="BGR")
    assert torch.equal(swapped.get_image_embedding(), straight.get_image_embedding())


def test_nothing_works_before_a_picture_is_set(model):
    predictor = Predictor(model)
    for action in (predictor.get_image_embedding, lambda: predictor.predict(POINTS, LABELS)):
        with pytest.raises(ValueError, match="no picture is set; call set_image before predict"):
            action()


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (PIXELS, "RGBA", "image_format must be 'RGB' or 'BGR'; got 'RGBA'"),
        (PIXELS, "rgb", "image_format"),
        (PIXELS[..., 0], "BGR", "uint8 RGB array"),
        (PIXELS / 255, "BGR", "uint8 RGB array; got float64"),
        (None, "BGR", "got NoneType"),
    ],
)
def test_a_refused_picture_changes_nothing(predictor, image, kind, message):
    before = predictor.get_image_embedding()
    with pytest.raises(ValueError, match=message):
        predictor.set_image(image, kind)
    assert predictor.get_image_embedding() is before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "empty prompt"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0)}, "empty prompt"),
        ({"point_labels": LABELS}, "point_labels came without point_coords"),
        ({"point_coords": POINTS}, "one label for each of the 2 points"),
        ({"point_coords": POINTS, "point_labels": LABELS[:1]}, r"2 points; got shape \(1,\)"),
        ({"point_coords": POINTS[0], "point_labels": LABELS}, r"must be \(N, 2\) x, y; got shape \(2,\)"),
        ({"point_coords": np.zeros((2, 3)), "point_labels": LABELS}, r"got shape \(2, 3\)"),
        ({"point_coords": POINTS, "point_labels": [1, 2]}, "label must be 1"),
        ({"point_coords": [[30, 40], [np.nan, 2]], "point_labels": LABELS}, "finite"),
        ({"point_coords": [[30, 40], [120, 2]], "point_labels": LABELS}, r"click 1 at \(120, 2\) is outside"),
        ({"box": [1, 2, 3]}, "four finite numbers"),
        ({"box": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "four finite numbers"),
        ({"box": [30, 2, 3, 4]}, "x0 < x1"),
        ({"mask_input": np.zeros((32, 32, 32))}, r"mask_input must be \(1, 32, 32\)"),
        ({"mask_input": np.zeros((1, 64, 16))}, r"mask_input must be \(1, 32, 32\)"),
        ({"mask_input": np.zeros(1024)}, r"mask_input must be \(1, 32, 32\)"),
        ({"mask_input": np.float32(1)}, r"mask_input must be \(1, 32, 32\)"),
    ],
)
def test_wrong_prompts_are_refused(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)
