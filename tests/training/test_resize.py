"""One target and one rule for both images of a pair; aspects survive; frames say where."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_diffusion import write_model, write_pairs
from trainings import quick

from fifa.errors import FifaError
from fifa.training.job import plan_training
from fifa.training.resize import Frame, Resize, bucket_sizes, cut

sides = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(sides, sides, st.booleans(), st.sampled_from([(256, 8), (512, 8), (1024, 16)]))
def test_both_images_of_a_pair_get_one_target_and_lose_one_dimension_at_most(
    winner, loser, buckets, sizes
):
    resize = Resize(*sizes, buckets)
    frames = resize.frames(winner, loser)
    assert frames[0][4:] == frames[1][4:] == resize.frames(loser, winner)[0][4:]
    assert frames[0][4:] in resize.sizes
    for frame, size in zip(frames, (winner, loser), strict=True):
        assert frame[:2] == size
        assert frame.top >= 0 and frame.left >= 0 and 0 in (frame.top, frame.left)


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (256, 8), (512, 16), (1024, 16)])
def test_buckets_have_about_the_area_of_the_square_and_sides_that_fit(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and len(sizes) == len({*sizes})
    assert {(w, h) for h, w in sizes} == {*sizes}
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        assert 0.7 * resolution**2 < h * w <= resolution**2
        assert max(h, w) <= 2 * min(h, w)


def test_sdxl_buckets_are_the_usual_ones():
    usual = [(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (1216, 832), (1152, 896)]
    assert {*usual} <= {*bucket_sizes(1024, 16)}


def test_with_buckets_a_circle_stays_a_circle():
    width, height = 900, 500
    y, x = np.mgrid[0:height, 0:width]
    disc = (255 * ((x - 450) ** 2 + (y - 250) ** 2 < 200**2)).astype(np.uint8)
    image = Image.fromarray(np.stack([disc] * 3, -1))
    frame, _ = Resize(256, 8, buckets=True).frames((height, width), (height, width))
    pixels = cut(image, frame)[0] > 127
    assert abs(int(pixels.any(0).sum()) - int(pixels.any(1).sum())) <= 1
    assert pixels.any(0).sum() == pytest.approx(400 * frame.target_height / height, abs=2)


def test_a_centre_crop_is_pillows():
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (300, 517, 3), np.uint8))
    frame, other = Resize(64, 8).frames((300, 517), (64, 64))
    expected = image.resize((110, 64), Image.Resampling.LANCZOS).crop((23, 0, 87, 64))
    assert frame == Frame(300, 517, 0, 23, 64, 64)
    np.testing.assert_array_equal(cut(image, frame), np.asarray(expected).transpose(2, 0, 1))
    # an image that has the size already keeps its pixels
    small = Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8))
    np.testing.assert_array_equal(cut(small, other), np.asarray(small).transpose(2, 0, 1))
    np.testing.assert_array_equal(cut(small, other, flip=True), cut(small, other)[..., ::-1])


def test_a_sliver_does_not_fill_the_memory():
    frame, _ = Resize(512, 8).frames((1, 20_000), (1, 20_000))
    pixels = cut(Image.new("RGB", (20_000, 1), (9, 8, 7)), frame)
    assert pixels.shape == (3, 512, 512)
    assert (pixels == np.array([9, 8, 7], np.uint8)[:, None, None]).all()


def test_a_resolution_that_does_not_fit_the_model():
    with pytest.raises(FifaError, match="multiple of 16"):
        Resize(1000, 16)


def test_buckets_are_the_default_of_families_that_were_trained_on_them(tmp_path):
    write_pairs(tmp_path / "pairs.parquet", (((128, 64), (128, 64)), ((64, 64), (64, 64))))
    for kind, buckets in (("sd15", False), ("sdxl", True)):
        write_model(tmp_path / kind, kind)
        for asked, found in ((None, buckets), (not buckets, not buckets)):
            plan = plan_training(quick(tmp_path, kind, buckets=asked), tmp_path / "out")
            assert plan.buckets is found
            assert ("in buckets" in str(plan)) is found
