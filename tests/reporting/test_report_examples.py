import base64
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from report_runs import make_run

from fifa.data.decode import BadImage
from fifa.data.table import load_pairs
from fifa.reporting.examples import LARGEST, SIDES, choose_rows, load_examples, thumbnail
from fifa.reporting.numbers import columns_of
from fifa.selection.table import load_selection


def loaded(folder):
    """The pairs of a run, and the columns of its selection."""
    pairs = load_pairs(folder)
    return pairs, columns_of(pairs.table, load_selection(folder))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("images")
    make_run(folder, pairs=80, keep=20, images=images)
    return folder, images


def opened(uri):
    assert uri.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def encoded(image, kind="PNG", **options):
    cell = io.BytesIO()
    image.save(cell, kind, **options)
    return cell.getvalue()


def test_the_ends_are_those_of_the_ranking(pictured):
    _, columns = loaded(pictured[0])
    groups = {
        (name, reason): rows for name, reason, rows in choose_rows(columns, n=3, n_gated=2) if rows
    }
    ranks = columns.rank[groups["kept_first", "selected"]].tolist()
    assert ranks[0] == 1
    assert ranks == sorted(ranks)
    assert 20 in columns.rank[groups["kept_last", "selected"]]
    assert columns.rank[groups["dropped_first", "below_cutoff"]][0] == 21
    assert {reason for name, reason in groups if name == "gated"} == {"tie", "unsafe_prompt"}
    for (_, reason), rows in groups.items():
        assert columns.because(reason)[rows].all()
        assert len(set(columns.prompt[rows])) == len(rows)


def test_pictures_are_those_of_their_sides_and_the_unsafe_have_none(pictured):
    folder, images = pictured
    quality = pq.read_table(next((folder / "scores").glob("quality-*")))
    groups = load_examples(*loaded(folder), quality)
    examples = [example for group in groups for example in group.examples]
    assert any(example.unsafe for example in examples)
    for example in examples:
        if example.unsafe:
            assert example.images is None
            continue
        for side, uri in enumerate(example.images):
            shown = opened(uri).resize((1, 1)).getpixel((0, 0))
            meant = Image.open(images / f"{example.row}_{side}.png").getpixel((0, 0))
            assert np.abs(np.subtract(shown, meant)).max() <= 6


def test_without_a_rater_nothing_is_known_to_be_unsafe(pictured):
    groups = load_examples(*loaded(pictured[0]), None)
    assert all(example.flags is None for group in groups for example in group.examples)


def test_an_image_that_is_gone_is_named_in_its_place(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    make_run(tmp_path, pairs=8, keep=2, images=images)
    for path in images.glob("*_1.png"):
        path.unlink()
    groups = load_examples(*loaded(tmp_path), None)
    for example in (example for group in groups for example in group.examples):
        assert opened(example.images[0])
        assert example.images[1] == "no such file"


def test_a_thumbnail_keeps_nothing_of_the_file_but_its_pixels():
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = encoded(Image.new("RGB", (900, 300), "red"), "JPEG", exif=exif, comment=b"secret")
    shown = opened(thumbnail(data))
    assert shown.size == (448, 149)
    raw = base64.b64decode(thumbnail(data).partition(",")[2])
    assert b"where I live" not in raw
    assert b"secret" not in raw


def test_a_picture_takes_no_more_bytes_than_it_may():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    uri = thumbnail(encoded(Image.fromarray(noise)))
    assert len(base64.b64decode(uri.partition(",")[2])) <= LARGEST
    assert opened(uri).size in {(side, side) for side in SIDES[1:]}


def test_what_is_transparent_is_white():
    shown = opened(thumbnail(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)))))
    assert min(shown.getpixel((10, 10))) > 250


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(BadImage):
        thumbnail(data)
