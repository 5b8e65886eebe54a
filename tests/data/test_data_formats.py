"""Every format in its own schema, its labels against a hand-written loop over the same rows."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.data import read_pairs
from fifa.data.columns import side_pairs
from fifa.data.table import Pairs
from fifa.errors import FifaError

N = 40


def labels(pairs: Pairs) -> dict[tuple[str, str, str], float]:
    """The label of every (prompt, image, other image), from both sides."""
    found = {}
    for row in pairs.table.to_pylist():
        found[row["prompt"], row["image_0"], row["image_1"]] = row["label"]
        found[row["prompt"], row["image_1"], row["image_0"]] = 1 - row["label"]
    return found


def assert_labels(pairs: Pairs, expected: dict[tuple[str, str, str], float]) -> None:
    found = labels(pairs)
    assert len(pairs) == len(expected)
    for key, label in expected.items():
        assert found[key] == pytest.approx(label, abs=1e-6), key


def assert_no_leak(pairs: Pairs) -> None:
    """The winner stands on either side about as often."""
    zero = np.count_nonzero(pairs.table["label"].to_numpy() > 0.5)
    one = np.count_nonzero(pairs.table["label"].to_numpy() < 0.5)
    assert min(zero, one) > 0.25 * (zero + one)


def write_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def pickapic(n: int = N) -> dict[str, list[object]]:
    first = [[1.0, 0.0, 0.5][i % 3] for i in range(n)]
    return {
        "are_different": [True] * n,
        "best_image_uid": [f"u{i}" for i in range(n)],
        "caption": [f"prompt {i // 2}" for i in range(n)],
        "has_label": [True] * n,
        "image_0_uid": [f"u{i}" for i in range(n)],
        "image_0_url": [f"https://x.org/u{i}.png" for i in range(n)],
        "image_1_uid": [f"v{i}" for i in range(n)],
        "image_1_url": [f"https://x.org/v{i}.png" for i in range(n)],
        "label_0": first,
        "label_1": [1 - label for label in first],
        "ranking_id": list(range(n)),
        "user_id": list(range(n)),
        "hps_0": [float(i) for i in range(n)],
        "hps_1": [float(-i) for i in range(n)],
    }


@pytest.mark.parametrize("images", [False, True])
def test_pickapic_keeps_sides_labels_and_scores(tmp_path: Path, images: bool) -> None:
    columns = pickapic()
    if images:
        columns |= {"jpg_0": [b"a"] * N, "jpg_1": [b"b"] * N}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "pickapic"
    assert pairs.origin.score_columns == ("hps_0", "hps_1")
    assert pairs.table["label"].to_pylist() == columns["label_0"]
    assert pairs.table["image_0"].to_pylist() == columns["image_0_uid"]
    assert pairs.table["hps_1"].to_pylist() == columns["hps_1"]
    assert not any(pairs.table["swapped"].to_pylist())
    assert len(pairs.prompts) == N // 2
    assert pairs.origin.cells == (("jpg_0", "jpg_1") if images else None)
    urls = [None] * N if images else columns["image_0_url"]
    assert pairs.table["image_0_ref"].to_pylist() == urls


def test_pickapic_with_empty_cells_keeps_the_urls(tmp_path: Path) -> None:
    cells = {"jpg_0": pa.nulls(N, pa.binary()), "jpg_1": pa.nulls(N, pa.binary())}
    pq.write_table(pa.table(pickapic() | cells), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.cells is None
    assert pairs.table["image_1_ref"][3].as_py() == "https://x.org/v3.png"


def test_pickapic_webdataset_reads_headers_and_refers_to_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for i in range(9):
            members = {
                "jpg_0.jpg": b"zero%d" % i,
                "jpg_1.jpg": b"one-%d" % i,
                "label_0.txt": str([1, 0, 0.5][i % 3]).encode(),
                "label_1.txt": str([0, 1, 0.5][i % 3]).encode(),
                "original_prompt.txt": f"prompt {i}".encode(),
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"../../{i:06d}.{name}")  # a name, never a place
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pairs = read_pairs(tmp_path / "00000.tar")
    assert pairs.table["label"].to_pylist() == [1, 0, 0.5] * 3
    assert pairs.table["prompt"].to_pylist() == [f"prompt {i}" for i in range(9)]
    assert pairs.table["image_0"][4].as_py() == "00000.tar#../../000004.jpg_0.jpg"
    raw = (tmp_path / "00000.tar").read_bytes()
    for i, ref in enumerate(pairs.table["image_1_ref"].to_pylist()):
        offset, size = map(int, ref.split(":")[1].split("+"))
        assert raw[offset : offset + size] == b"one-%d" % i


def test_diffusers_columns_name_images_by_their_place(tmp_path: Path) -> None:
    columns = {
        "jpg_0": [b"a", b"b"],
        "jpg_1": [b"c", b"d"],
        "label_0": [1, 0],
        "caption": ["x", "y"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "diffusers"
    assert pairs.table["image_1"].to_pylist() == ["a.parquet#0:jpg_1", "a.parquet#1:jpg_1"]
    assert pairs.table["label"].to_pylist() == [1, 0]


@pytest.mark.parametrize("paths", ["file_path", "image_path"])
def test_hpdv2_train(tmp_path: Path, paths: str) -> None:
    rows = [
        {
            "prompt": f"p{i}",
            paths: [f"{i}a.jpg", f"{i}b.jpg"],
            "human_preference": [i % 2, 1 - i % 2],
        }
        for i in range(N)
    ]
    pairs = read_pairs(write_json(tmp_path / "train.json", rows))
    assert pairs.origin.format == "hpdv2"
    assert_labels(pairs, {(r["prompt"], *r[paths]): float(r["human_preference"][0]) for r in rows})


def test_hpdv2_test_labels_are_vote_shares(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"p{i}",
            "image_path": [f"{i}-{j}.jpg" for j in range(5)],
            "rank": list(range(1, 6)),
            "raw_annotations": [
                {"rank": rng.integers(1, 4, 5).tolist(), "user_hash": str(u)} for u in range(7)
            ],
        }
        for i in range(6)
    ]
    pairs = read_pairs(write_json(tmp_path / "test.json", rows))
    expected = {}
    for row in rows:
        for a, b in itertools.combinations(range(5), 2):
            wins = 0.0
            for note in row["raw_annotations"]:
                wins += 1.0 if note["rank"][a] < note["rank"][b] else 0.0
                wins += 0.5 if note["rank"][a] == note["rank"][b] else 0.0
            expected[row["prompt"], row["image_path"][a], row["image_path"][b]] = wins / 7
    assert_labels(pairs, expected)
    assert set(pairs.table["votes"].to_pylist()) == {7}


def test_hpdv2_test_without_annotations_uses_the_rank(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "image_path": ["a", "b", "c"], "rank": [1, 2, 2]} for i in range(N)]
    pairs = read_pairs(write_json(tmp_path / "test.json", rows))
    expected = {}
    for i in range(N):
        expected |= {(f"p{i}", "a", "b"): 1.0, (f"p{i}", "a", "c"): 1.0, (f"p{i}", "b", "c"): 0.5}
    assert_labels(pairs, expected)
    assert_no_leak(pairs)


def test_hpdv3_always_names_the_winner_first_and_the_sides_do_not_tell(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"p{i}",
            "path1": f"images/{i}w.jpg",
            "path2": f"images/{i}l.jpg",
            "confidence": 0.5 + i / 100,
            "choice_dist": [12, 3] if i % 2 else None,
            "model1": "m",
            "model2": "n",
            "score1": float(i),
            "score2": -float(i),
        }
        for i in range(N)
    ]
    pairs = read_pairs(write_json(tmp_path / "all.json", rows))
    share = {True: 12 / 15, False: 1.0}  # of the votes, where the source has them
    assert_labels(
        pairs,
        {(r["prompt"], r["path1"], r["path2"]): share[r["choice_dist"] is not None] for r in rows},
    )
    assert_no_leak(pairs)
    for row in pairs.table.to_pylist():
        source = rows[row["row"]]
        second = row["image_0"] == source["path2"]
        assert row["swapped"] == second
        assert row["image_0_ref"] == row["image_0"]
        assert row["score1"] == source["score2" if second else "score1"]
        assert row["score2"] == source["score1" if second else "score2"]
        assert row["confidence"] == source["confidence"]
    # neither the order of the rows nor the side of the winner decides the sides
    for row in rows:
        row["path1"], row["path2"] = row["path2"], row["path1"]
    turned = read_pairs(write_json(tmp_path / "all.json", rows[::-1]))
    sides = {row["pair_id"]: row["image_0"] for row in pairs.table.to_pylist()}
    assert sides == {row["pair_id"]: row["image_0"] for row in turned.table.to_pylist()}


def test_imagereward_json(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "prompt": f"p{i}", "generations": ["a", "b", "c"], "ranking": [2, 1, 2]}
        for i in range(N)
    ]
    pairs = read_pairs(write_json(tmp_path / "train.json", rows))
    expected = {}
    for i in range(N):
        expected |= {(f"p{i}", "b", "a"): 1.0, (f"p{i}", "b", "c"): 1.0, (f"p{i}", "a", "c"): 0.5}
    assert_labels(pairs, expected)
    assert_no_leak(pairs)


@pytest.mark.parametrize("cells", [False, True])
def test_imagerewarddb_pairs_the_images_of_a_prompt(tmp_path: Path, cells: bool) -> None:
    rng = np.random.default_rng(1)
    rows = [
        {
            "image": {"bytes": b"%d-%d" % (i, j), "path": f"images/{i}-{j}.webp"},
            "prompt_id": f"id{i}",
            "prompt": f"p{i}",
            "rank": int(rng.integers(1, 4)),
            "overall_rating": j,
        }
        for i in range(8)
        for j in range(4)
    ]
    if cells:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    else:
        rows = [row | {"image_path": row.pop("image")["path"]} for row in rows]
        write_json(tmp_path / "train.json", rows)
    pairs = read_pairs(tmp_path)
    expected = {}
    for i in range(8):
        for a, b in itertools.combinations(range(4), 2):
            left, right = rows[4 * i + a]["rank"], rows[4 * i + b]["rank"]
            label = 1.0 if left < right else 0.0 if left > right else 0.5
            expected[f"p{i}", f"images/{i}-{a}.webp", f"images/{i}-{b}.webp"] = label
    assert_labels(pairs, expected)
    for row in pairs.table.to_pylist():
        assert row["overall_rating_0"] == int(row["image_0"].split("-")[1][0])
    if cells:
        row = pairs.table.to_pylist()[0]
        place, column = row["image_1_ref"].split(":")[1:]
        assert rows[int(place)][column]["path"] == row["image_1"]


def test_open_image_preferences_binarized(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "id": list(range(N)),
            "prompt": [f"p{i}" for i in range(N)],
            "chosen": pa.array([{"bytes": b"w", "path": f"{i}.jpg"} for i in range(N)], image),
            "rejected": pa.array([{"bytes": b"l", "path": f"{i}.jpg"} for i in range(N)], image),
            "chosen_model": ["a"] * N,
            "rejected_model": ["b"] * N,
            "category": ["c"] * N,
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "open-image-preferences"
    # both cells carry the same last part of a path: it is no key
    name = "train.parquet#{}:{}".format
    assert_labels(pairs, {(f"p{i}", name(i, "chosen"), name(i, "rejected")): 1.0 for i in range(N)})
    assert_no_leak(pairs)
    assert pairs.origin.cells == ("chosen", "rejected")
    assert not any(pairs.table["repeat"].to_pylist())


@pytest.mark.parametrize("urls", [False, True])
def test_open_image_preferences_results(tmp_path: Path, urls: bool) -> None:
    answers = [
        ["image_1"],
        ["image_2", "image_1", "image_1"],
        ["both_good", "image_2"],
        ["both_bad"],
    ]
    shares = [1.0, 2 / 3, 0.25, 0.5]
    rows = []
    for i, answer in enumerate(answers):
        images = {f"image_{k}": f"https://x.org/{i}/{k}.jpg" for k in (1, 2)}
        if not urls:
            images = {k: {"bytes": b"x", "path": path} for k, path in images.items()}
        rows.append({"images": images | {"prompt": f"p{i}"}, "preference.responses": answer})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pairs = read_pairs(tmp_path)
    url = "https://x.org/{}/{}.jpg".format
    assert_labels(pairs, {(f"p{i}", url(i, 1), url(i, 2)): share for i, share in enumerate(shares)})
    assert pairs.table["votes"].to_pylist() == [1, 3, 2, 1]
    assert pairs.origin.cells == (None if urls else ("images.image_1", "images.image_2"))


def test_rapidata_label_is_the_share_of_the_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [
        {
            "prompt": f"p{i}",
            "image1": f"{i}a.jpg",
            "image2": f"{i}b.jpg",
            "weighted_results_image1_preference": float(rng.random()),
            "weighted_results_image2_preference": float(rng.random()),
            "weighted_results_image1_alignment": float(i),
            "weighted_results_image2_alignment": float(-i),
        }
        for i in range(N)
    ]
    rows[3]["weighted_results_image1_preference"] = 0.0
    rows[3]["weighted_results_image2_preference"] = 0.0
    pairs = read_pairs(write_json(tmp_path / "a.json", rows))
    expected = {}
    for row in rows[:3] + rows[4:]:
        one = row["weighted_results_image1_preference"]
        two = row["weighted_results_image2_preference"]
        expected[row["prompt"], row["image1"], row["image2"]] = one / (one + two)
    assert_labels(pairs, expected)
    assert pairs.rejected.to_pylist() == [
        {"file": "a.json", "row": 3, "reason": "nobody voted for either image"}
    ]
    assert pairs.table["weighted_results_image2_alignment"][2].as_py() == -2.0


def test_genai_arena_votes(tmp_path: Path) -> None:
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "upvote"]
    table = pa.table(
        {
            "prompt": [f"p{i}" for i in range(5)],
            "left_model": ["a"] * 5,
            "left_image": [f"l{i}.jpg" for i in range(5)],
            "right_model": ["b"] * 5,
            "right_image": [f"r{i}.jpg" for i in range(5)],
            "vote_type": votes,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["label"].to_pylist() == [1.0, 0.0, 0.5, 0.5]
    assert pairs.rejected["reason"].to_pylist() == ["unknown vote_type 'upvote'"]


def test_mj_bench_label_is_the_index_of_the_better_image(tmp_path: Path) -> None:
    rows = [
        {"caption": f"p{i}", "image0": f"safe/{i}.jpg", "image1": f"unsafe/{i}.jpg", "label": 0}
        for i in range(N)
    ]
    rows[5]["label"] = 1
    pairs = read_pairs(write_json(tmp_path / "a.json", rows))
    assert_labels(pairs, {(r["caption"], r["image0"], r["image1"]): 1.0 - r["label"] for r in rows})
    assert_no_leak(pairs)


def test_chosen_and_rejected_paths_in_json_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": f"c{i}.png", "rejected": f"r{i}.png", "chosen_score": i}
        | {"rejected_score": -i}
        for i in range(N)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs(tmp_path)
    assert_labels(pairs, {(r["prompt"], r["chosen"], r["rejected"]): 1.0 for r in rows})
    assert_no_leak(pairs)
    for row in pairs.table.to_pylist():
        sign = 1 if row["image_0"].startswith("c") else -1
        assert row["chosen_score"] == sign * row["row"]


def test_own_table_with_columns_and_an_embedding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "text,left,right,p,clip\nred,a.png,b.png,0.75,1.5\nblue,c.png,d.png,true,2\n"
    )
    names = {"prompt": "text", "image_0": "left", "image_1": "right", "label": "p"}
    pairs = read_pairs(tmp_path / "a.csv", columns=names)
    assert pairs.table["label"].to_pylist() == [0.75, 1.0]
    assert pairs.table["clip"].to_pylist() == [1.5, 2.0]
    rows = [{"prompt": "x", "image_0": "a", "image_1": "b", "label": 1, "vector": [1, 2.5]}]
    write_json(tmp_path / "b.json", rows)
    pairs = read_pairs(tmp_path / "b.json", columns={"embedding": "vector"})
    assert pairs.table["embedding"].to_pylist() == [[1.0, 2.5]]
    assert "embedding" in pairs.origin.score_columns


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "left": ["a"], "right": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(FifaError, match="'p'") as error:
        read_pairs(
            tmp_path,
            columns={"prompt": "text", "image_0": "left", "image_1": "right", "label": "p"},
        )
    assert "left, right, text" in str(error.value)
    with pytest.raises(FifaError, match="--columns"):
        read_pairs(tmp_path)


def test_formats_do_not_mix_but_can_be_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    write_json(tmp_path / "b.json", [{"prompt": "x", "path1": "c", "path2": "d"}])
    with pytest.raises(FifaError, match="chosen-rejected and hpdv3"):
        read_pairs(tmp_path)
    pairs = read_pairs(tmp_path, format="hpdv3")
    assert len(pairs) == 1
    assert pairs.rejected["file"].to_pylist() == ["a.json"]
    with pytest.raises(FifaError, match="no format"):
        read_pairs(tmp_path, format="hpdv9")


def test_what_fifa_exports_reads_back(tmp_path: Path) -> None:
    columns = pickapic() | {"jpg_0": [b"a"] * N, "jpg_1": [b"b"] * N}
    columns |= {"pair_id": ["x"] * N, "label": [1.0] * N, "votes": [3] * N, "importance": [0.1] * N}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "pickapic"
    assert set(pairs.origin.score_columns) == {
        "hps_0", "hps_1", "source_label", "source_votes", "importance",
    }  # fmt: skip
    assert set(pairs.table["votes"].to_pylist()) == {1}


def test_how_many_votes_a_label_averages_is_read(tmp_path: Path) -> None:
    odd = [3, 7, None, 0, float("nan"), 2.5e10]
    columns = pickapic() | {"label_votes": [*odd, *[1] * (N - len(odd))]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["row"].to_pylist() == list(range(N))
    assert pairs.table["votes"].to_pylist() == [3, 7] + [1] * (N - 2)
    assert "label_votes" not in pairs.origin.score_columns


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["hps_0", "hps_1"], [("hps_0", "hps_1")]),
        (["s1", "s2", "confidence"], [("s1", "s2")]),
        (["x10", "x11"], []),
        (["chosen_score", "rejected_score"], [("chosen_score", "rejected_score")]),
        (["image1_a", "image2_a"], [("image1_a", "image2_a")]),
        (["r_a", "r_b", "alpha"], [("r_a", "r_b")]),
    ],
)
def test_columns_of_the_two_sides_are_told_by_one_word(
    names: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert side_pairs(names) == pairs
