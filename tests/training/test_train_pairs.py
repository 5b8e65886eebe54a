"""Pairs to train on: the winner first, nothing that is none, nothing in memory."""

import hashlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_diffusion import images_of, write_pairs

from fifa.data.images import read
from fifa.errors import FifaError
from fifa.training.pairs import read_training_pairs


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_the_winner_comes_first_and_ties_are_no_wins(tmp_path):
    labels = [1.0, 0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    sizes = [((16, 8), (8, 16))] * 7
    path = write_pairs(tmp_path / "a.parquet", sizes, label_0=labels, label_1=None)
    pairs = read_training_pairs(path)
    expected = [
        (r["caption"], r["jpg_0" if r["label_0"] == 1 else "jpg_1"], r["label_0"])
        for r in rows_of(path)
        if r["label_0"] != 0.5
    ]
    assert [(c, images_of(pairs, i)[0]) for i, c in enumerate(pairs.caption)] == [
        (caption, winner) for caption, winner, _ in expected
    ]
    losers = [
        r["jpg_1" if r["label_0"] == 1 else "jpg_0"] for r in rows_of(path) if r["label_0"] != 0.5
    ]
    assert [images_of(pairs, i)[1] for i in range(len(pairs))] == losers
    assert pairs.dropped == {"tie": 2}
    assert pairs.label.tolist() == [1.0] * 5 and pairs.weight.tolist() == [1.0] * 5


def test_soft_labels_weights_and_rows_without_a_label(tmp_path):
    path = write_pairs(
        tmp_path / "a.parquet",
        label_0=[1.0, 0.0, None, 1.0],
        label=pa.array([0.75, 0.25, None, None], pa.float32()),
        weight=[0.5, 2.0, 1.0, None],
        has_label=[True, True, True, False],
        pair_id=["x", "y", "z", "w"],
        signed_margin=pa.array([0.5, None, 1.0, 1.0], pa.float32()),
    )
    pairs = read_training_pairs(path)
    assert pairs.pair_id == ["x", "y"]
    assert pairs.margin[0] == 0.5 and np.isnan(pairs.margin[1])
    assert pairs.label.tolist() == [0.75, 0.75]
    assert pairs.weight.tolist() == [0.5, 2.0]
    assert pairs.dropped == {"no_label": 2}


def test_rows_without_a_prompt_are_dropped_as_read_rejects_them(tmp_path):
    path = write_pairs(
        tmp_path / "a.parquet", caption=["a cat", "", " \t", None], label_0=[1.0] * 4
    )
    pairs = read_training_pairs(path)
    assert pairs.caption == ["a cat"] and pairs.dropped == {"no_prompt": 3}


def test_images_in_any_order_from_several_files_and_structs(tmp_path):
    one = write_pairs(tmp_path / "in" / "0.parquet", [((9, 9), (8, 8))] * 8, seed=1)
    two = write_pairs(tmp_path / "in" / "1.parquet", [((9, 9), (8, 8))] * 5, seed=2)
    table = pq.read_table(two)
    for name in ("jpg_0", "jpg_1"):
        cells = pa.array([{"bytes": b, "path": None} for b in table[name].to_pylist()])
        table = table.set_column(table.column_names.index(name), name, cells)
    pq.write_table(table, two, row_group_size=2)
    rows = [*rows_of(one), *rows_of(two)]
    pairs = read_training_pairs(tmp_path / "in")

    def plain(i, side):
        cell = rows[i][f"jpg_{side if rows[i]['label_0'] else 1 - side}"]
        return cell["bytes"] if isinstance(cell, dict) else cell

    order = [(12, 1), (3, 0), (3, 1), (0, 0), (7, 1), (8, 0), (8, 0), (12, 0), (1, 1), (11, 0)]
    found = list(read(pairs.image_table, [2 * i + side for i, side in order]))
    assert sorted(row for row, _ in found) == sorted(2 * i + side for i, side in order)
    assert all(data == plain(row // 2, row % 2) for row, data in found)
    assert len(read_training_pairs(str(tmp_path / "in" / "*.parquet"))) == 13


def test_ids_name_prompt_winner_and_loser(tmp_path):
    path = write_pairs(tmp_path / "a.parquet", label_0=[1.0] * 4, label_1=None)
    rows = pq.read_table(path)
    twice = pa.concat_tables([rows, rows.slice(0, 1)])
    pq.write_table(twice, tmp_path / "b.parquet")
    ids, again = (read_training_pairs(tmp_path / n).pair_id for n in ("a.parquet", "b.parquet"))
    assert again[:4] == ids and len({*again}) == 5
    other = rows.set_column(rows.column_names.index("label_0"), "label_0", pa.array([0.0] * 4))
    pq.write_table(other, tmp_path / "c.parquet")
    assert not {*read_training_pairs(tmp_path / "c.parquet").pair_id} & {*ids}


def test_the_digest_follows_what_is_trained_on(tmp_path):
    seen = {
        read_training_pairs(write_pairs(tmp_path / f"{i}.parquet", **columns)).digest
        for i, columns in enumerate(
            [{}, {"caption": list("abcd")}, {"weight": [1.0, 2, 3, 4]}, {"label_0": [1.0] * 4}]
        )
    }
    assert len(seen) == 4
    shutil.copy(tmp_path / "0.parquet", tmp_path / "moved.parquet")
    assert read_training_pairs(tmp_path / "moved.parquet").digest in seen


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"jpg_1": None}, "no column jpg_1"),
        ({"jpg_0": None, "image_0_url": ["u"] * 4}, "no images, only their references"),
        ({"label_0": [1.0, 0.0, 7.0, 1.0]}, r"label_0 is not on a scale .* 7 \(1\)"),
        ({"label_0": [1.0] * 4, "label": [0.9, 0.9, 0.1, 0.9]}, "label 0.1 name two winners"),
        ({"label_0": [0.5] * 4}, "no pair with a winner"),
        ({"weight": [1.0, -1.0, 1.0, 1.0]}, "negative"),
        ({"weight": [0.0] * 4}, "weight 0"),
        ({"pair_id": ["a", "b", "a", "c"]}, "come twice"),
    ],
)
def test_what_cannot_be_trained_on_is_said_at_once(tmp_path, columns, message):
    with pytest.raises(FifaError, match=message):
        read_training_pairs(write_pairs(tmp_path / "a.parquet", **columns))


def test_a_missing_image_names_its_pair(tmp_path):
    path = write_pairs(tmp_path / "a.parquet", jpg_1=[b"x", None, b"y", b"z"], pair_id=list("abcd"))
    pairs = read_training_pairs(path)
    with pytest.raises(FifaError, match=r"pair b, loser: row 1 .*a\.parquet") as raised:
        raise pairs.unreadable(3, images_of(pairs, 1)[1].reason)
    assert "with images" in str(raised.value)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(hashlib.sha256(b"no parquet").digest())
    with pytest.raises(FifaError, match=r"cannot read the Parquet file[\s\S]*a\.parquet"):
        read_training_pairs(tmp_path)


def test_a_run_folder_without_a_subset_says_what_to_do(tmp_path):
    (tmp_path / "recipe.yaml").write_text("read: {source: x}\n")
    with pytest.raises(FifaError, match="fifa export"):
        read_training_pairs(tmp_path)


def test_a_pair_of_one_image_teaches_nothing_and_is_counted(tmp_path, capfd):
    path = write_pairs(tmp_path / "a.parquet", label_0=[1.0] * 4)
    table = pq.read_table(path)
    second = table["jpg_1"].to_pylist()
    second[2] = table["jpg_0"][2].as_py()
    twin = table.set_column(table.column_names.index("jpg_1"), "jpg_1", pa.array(second))
    pq.write_table(twin, path)
    pairs = read_training_pairs(path)
    assert pairs.caption == [f"the cat number {i}" for i in (0, 1, 3)]
    assert pairs.dropped == {"same_image": 1}
    assert "4 rows, 3 pairs with a winner (dropped: 1 same_image)" in capfd.readouterr().err
    assert images_of(pairs, 2) == (table["jpg_0"][3].as_py(), second[3])
    pq.write_table(twin.append_column("pair_id", pa.array(list("abcd"))), path)
    assert read_training_pairs(path).pair_id == ["a", "b", "d"]
    pq.write_table(twin.slice(2, 1), path)
    with pytest.raises(FifaError, match=r"no pair with a winner \(dropped: 1 same_image\)"):
        read_training_pairs(path)


def test_pairs_that_contradict_each_other_are_told(tmp_path, capfd):
    path = write_pairs(tmp_path / "a.parquet", label_0=[1.0] * 4)
    rows = pq.read_table(path).slice(0, 1).to_pylist() * 3
    rows[1] = rows[1] | {"label_0": 0.0, "label_1": 1.0}
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert len(read_training_pairs(path)) == 3
    assert "2 pairs say the opposite of another" in capfd.readouterr().err
