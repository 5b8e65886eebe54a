"""What is written for each trainer, and that nothing gets lost on the way to it and back.

That the trainers' own loaders read it is what ``scripts/check_export.py`` looks at.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import fifa
from fifa.cli import cli
from fifa.config import Export, Read, Recipe, Score, Select
from fifa.data import read_pairs
from fifa.data.images import pair_images, read
from fifa.errors import FifaError
from fifa.scoring.table import Scores
from fifa.selection import trainers
from fifa.selection.export import export, rebuild
from fifa.selection.trainers import TARGETS

OTHERS = [name for name in TARGETS if name != Export().to]
WITH_PIXELS = [name for name in OTHERS if TARGETS[name].images == "needed"]
KINDS = [("png", "jpg"), ("jpg", "jpg"), ("webp", "png"), ("png", "webp"), ("jpg", "png")]
LABELS = (1.0, 0.0, 0.8, 0.3, 0.0)
PROMPTS = [f'{i}: "Füchse" | a, b\n  line two \u2603 {"long " * 300}end ' for i in range(5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five pairs of PNG, JPEG and WEBP; the first two share an image."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(3)
    rows = []
    for i, kinds in enumerate(KINDS):
        names = [f"{i}-{side}.{kind}" for side, kind in enumerate(kinds)]
        names[0] = "0-0.png" if i == 1 else names[0]
        for name in names:
            picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            if not (folder / name).exists():
                picture.save(folder / name)
        row = {"prompt": PROMPTS[i], "image_0": names[0], "image_1": names[1], "label": LABELS[i]}
        rows.append(row)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def wanted(world):
    """Winner's and loser's bytes by prompt."""
    rows = map(json.loads, (world / "pairs.jsonl").read_text("utf-8").splitlines())
    found = {}
    for row in rows:
        images = [(world / row[f"image_{side}"]).read_bytes() for side in (0, 1)]
        found[row["prompt"]] = tuple(images if row["label"] > 0.5 else images[::-1])
    return found


@pytest.fixture(scope="module")
def selected(world):
    pairs = read_pairs(world / "pairs.jsonl")
    return pairs, fifa.select(pairs, Scores(), strategy="random", keep=5)


def write(selected, folder, to, keep=None):
    pairs, selection = selected
    if keep:
        selection = fifa.select(pairs, Scores(), strategy="random", keep=keep)
    return export(pairs, selection, Scores(), folder, to=to)


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_back(pairs):
    """Winner's and loser's bytes by prompt, as our own readers find them."""
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    label = pairs.table["label"].to_pylist()
    sides = [(0, 1) if first > 0.5 else (1, 0) for first in label]
    prompts = pairs.table["prompt"].to_pylist()
    return {
        prompt: tuple(found[2 * i + side] for side in sides[i]) for i, prompt in enumerate(prompts)
    }


def test_the_default_is_a_target():
    assert Export().to in TARGETS
    assert len(OTHERS) == len(TARGETS) - 1


@pytest.mark.parametrize("to", ["webdataset", "imagefolder", "verl-omni"])
def test_what_is_written_is_read_back_with_the_same_winners(
    selected, wanted, tmp_path, to, monkeypatch
):
    monkeypatch.setattr(trainers, "GROUP_BYTES", 3000)  # two shards
    monkeypatch.setattr(trainers, "SHARD_BYTES", 4000)
    write(selected, tmp_path / "out", to)
    source, columns = tmp_path / "out" / "data", {}
    if to == "imagefolder":
        (source,) = (tmp_path / "out").glob("train-*")
        columns = {f"image_{side}": f"jpg_{side}_file_name" for side in (0, 1)}
        columns |= {"prompt": "caption", "label": "label_0"}
    if to == "verl-omni":
        source = tmp_path / "out" / "train.parquet"
        columns = {"image_0": "img_win", "image_1": "img_lose", "label": ":first"}
    pairs = read_pairs(source, columns=columns)
    assert pairs.rejected.num_rows == 0
    found = read_back(pairs)
    assert {prompt.strip(): images for prompt, images in wanted.items()} == {
        prompt.strip(): images for prompt, images in found.items()
    }
    if to == "webdataset":
        assert len(list(source.iterdir())) > 1
        assert set(pairs.table["pair_id"].to_pylist()) == set(
            selected[0].table["pair_id"].to_pylist()
        )


def test_webdataset_has_the_winner_first_and_everything_else_in_json(selected, wanted, tmp_path):
    write(selected, tmp_path / "out", "webdataset")
    (shard,) = (tmp_path / "out/data").iterdir()
    samples = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, column = member.name.partition(".")
            samples.setdefault(key, {})[column] = archive.extractfile(member).read()
    assert set(samples) == set(selected[0].table["pair_id"].to_pylist())
    shares = {}
    for sample in samples.values():
        prompt = sample["original_prompt.txt"].decode()
        assert (sample["jpg_0.jpg"], sample["jpg_1.jpg"]) == wanted[prompt]
        assert (sample["label_0.txt"], sample["label_1.txt"]) == (b"1", b"0")
        facts = json.loads(sample["json"])
        assert facts["weight"] == 1.0 and facts["votes"] == 1
        assert facts["image_0_uid"] != facts["image_1_uid"]
        shares[prompt] = round(facts["label"], 3)
    assert shares == dict(zip(PROMPTS, (1.0, 1.0, 0.8, 0.7, 1.0), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_imagefolder_is_loaded_by_datasets_and_never_from_an_old_cache(selected, wanted, tmp_path):
    datasets = pytest.importorskip("datasets")
    for keep in (3, 5):
        write(selected, tmp_path / "out", "imagefolder", keep)
        loaded = datasets.load_dataset(
            str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(loaded) == keep
    for row in loaded:
        sides = ["jpg_0", "jpg_1"] if row["label_0"] == 1 else ["jpg_1", "jpg_0"]
        for name, data in zip(sides, wanted[row["caption"]], strict=True):
            expected = Image.open(io.BytesIO(data))
            assert np.array_equal(np.asarray(row[name].convert("RGB")), expected.convert("RGB"))
    assert set(loaded["weight"]) == {1.0}
    (place,) = (tmp_path / "out").glob("train-*")
    assert len(list(place.iterdir())) == 1 + 9  # an image of two pairs once


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_trl_asks_which_image_is_better(selected, wanted, tmp_path):
    datasets = pytest.importorskip("datasets")
    write(selected, tmp_path / "out", "trl")
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    first = 0
    for row in loaded:
        ((user,), (chosen,), (rejected,)) = row["prompt"], row["chosen"], row["rejected"]
        assert (user["role"], chosen["role"], rejected["role"]) == ("user", *["assistant"] * 2)
        question, _, prompt = user["content"].partition("\n\n")
        assert question.endswith("?") and prompt == row["caption"]
        answers = ["Image 1", "Image 2"]
        winner = answers.index(chosen["content"])
        assert rejected["content"] == answers[1 - winner]
        sizes = [np.asarray(image.convert("RGB")) for image in row["images"]]
        for pixels, data in zip((sizes[winner], sizes[1 - winner]), wanted[prompt], strict=True):
            assert np.array_equal(pixels, Image.open(io.BytesIO(data)).convert("RGB"))
        first += winner == 0
    assert 0 < first < 5  # both answers are taught
    again = read_pairs(tmp_path / "out" / "data")
    known = {row["pair_id"]: row["label"] > 0.5 for row in selected[0].table.to_pylist()}
    assert {row["pair_id"]: row["label"] > 0.5 for row in again.table.to_pylist()} == known


@pytest.mark.parametrize("to", ["simpletuner", "onetrainer"])
def test_two_folders_have_equal_names_and_whole_captions(selected, wanted, tmp_path, to):
    write(selected, tmp_path / "out", to)
    win, lose = (tmp_path / "out" / name for name in ("win", "lose"))
    assert {path.name for path in win.iterdir()} == {path.name for path in lose.iterdir()}
    assert {path.stem for path in win.iterdir()} == set(selected[0].table["pair_id"].to_pylist())
    seen = {}
    for image in (path for path in win.iterdir() if path.suffix != ".txt"):
        caption = image.with_suffix(".txt").read_bytes().decode()
        assert (lose / image.name).with_suffix(".txt").read_bytes().decode() == caption
        seen[caption] = (image.read_bytes(), (lose / image.name).read_bytes())
        kind = {"jpg": "JPEG"}.get(image.suffix[1:], image.suffix[1:].upper())
        assert Image.open(io.BytesIO(image.read_bytes())).format == kind
    one_line = to == "onetrainer"  # where a line is a caption of its own
    assert seen == {" ".join(p.split()) if one_line else p: i for p, i in wanted.items()}


def test_simpletuner_pairs_the_folders_and_new_pairs_get_new_caches(selected, tmp_path):
    ids = []
    for keep in (3, 5):
        write(selected, tmp_path / "out", "simpletuner", keep)
        win, lose, text = json.loads((tmp_path / "out/multidatabackend.json").read_text())
        assert win["instance_data_dir"] == str(tmp_path / "out" / "win")
        assert lose["instance_data_dir"] == str(tmp_path / "out" / "lose")
        assert win["conditioning_data"] == [lose["id"]]
        assert lose["source_dataset_id"] == win["id"]
        assert lose["conditioning_type"] == "reference_strict"
        assert text["dataset_type"] == "text_embeds" and text["default"]
        ids.append((win["id"], lose["id"], win["cache_dir_vae"]))
    assert not set(ids[0]) & set(ids[1])


@pytest.mark.parametrize("to", [name for name in WITH_PIXELS if name != "flow-factory"])
def test_what_goes_to_a_trainer_is_read_again(selected, wanted, tmp_path, to):
    """Without options, and nothing of the folder is taken for a table that it is not."""
    write(selected, tmp_path / "out", to)
    pairs = read_pairs(tmp_path / "out")
    assert len(pairs) == 5
    assert not len(pairs.rejected)
    images = dict(read(pair_images(pairs.table, pairs.origin)))
    prompts = {" ".join(prompt.split()): found for prompt, found in wanted.items()}
    for i, row in enumerate(pairs.table.to_pylist()):
        sides = (images[2 * i], images[2 * i + 1])
        better = sides if row["label"] > 0.5 else sides[::-1]
        assert better == prompts[" ".join(row["prompt"].split())]


def test_onetrainer_is_given_the_winners_only(selected, tmp_path):
    write(selected, tmp_path / "out", "onetrainer")
    concepts = json.loads((tmp_path / "out/concepts.json").read_text())
    enabled = {Path(concept["path"]): concept["enabled"] for concept in concepts}
    assert enabled == {tmp_path / "out" / "win": True, tmp_path / "out" / "lose": False}


def test_verl_omni_has_scores_and_every_image_once(selected, tmp_path):
    write(selected, tmp_path / "out", "verl-omni")
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    scores = {row["prompt"]: (row["win_score"], row["lose_score"]) for row in rows}
    assert scores[PROMPTS[2]] == pytest.approx((0.8, 0.2))
    assert scores[PROMPTS[3]] == pytest.approx((0.7, 0.3))
    assert all(row["extra_info"]["raw_prompt"] == row["prompt"] for row in rows)
    assert {row["uid"] for row in rows} == set(selected[0].table["pair_id"].to_pylist())
    assert len(list((tmp_path / "out" / "images").iterdir())) == 9


def test_flow_factory_has_every_prompt_once_and_opens_no_image(tmp_path):
    rows = [
        {"prompt": f"p{i // 2}", "image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "label": i % 2}
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(tmp_path / "pairs.jsonl")  # none of these images is there
    selected = pairs, fifa.select(pairs, Scores(), strategy="random", keep=6)
    done = write(selected, tmp_path / "out", "flow-factory")
    assert not done.images
    (file,) = (tmp_path / "out").glob("prompts-*/train.jsonl")
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert sorted((row["prompt"], row["pairs"]) for row in found) == [
        (f"p{i}", 2) for i in (0, 1, 2)
    ]


@pytest.mark.parametrize("to", OTHERS)
def test_every_target_is_rebuilt_and_replaced_as_a_whole(selected, world, tmp_path, to, capsys):
    write(selected, tmp_path / "out", "webdataset", 3)
    first = write(selected, tmp_path / "out", to)
    told = capsys.readouterr().err
    assert TARGETS[to].layout in told and TARGETS[to].keeps in told
    assert TARGETS[to].keeps in (tmp_path / "out/README.md").read_text("utf-8")
    known = contents(tmp_path / "out")
    again = rebuild(tmp_path / "out/subset.json", tmp_path / "again", str(world / "pairs.jsonl"))
    assert again.digest == first.digest and again.pairs == 5
    moved = str(tmp_path / "again").encode(), str(tmp_path / "out").encode()
    assert {
        name: data.replace(*moved) for name, data in contents(tmp_path / "again").items()
    } == known


@pytest.mark.parametrize("to", WITH_PIXELS)
def test_a_trainer_that_needs_images_is_refused_references(tmp_path, to):
    row = {"prompt": "p", "image_0": "https://a.org/0", "image_1": "https://a.org/1", "label": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    selected = pairs, fifa.select(pairs, Scores(), strategy="random")
    with pytest.raises(FifaError, match=rf"{to} needs the images(.|\n)*--allow-download"):
        write(selected, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [*TARGETS, "kohya"])
def test_folders_of_others_and_unknown_trainers_are_refused(selected, tmp_path, to):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    message = "in it: notes.txt" if to in TARGETS else r"no such target: kohya(.|\n)*webdataset"
    with pytest.raises(FifaError, match=message):
        write(selected, tmp_path / "mine", to)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("to", WITH_PIXELS)
def test_what_fails_halfway_leaves_the_old_export(selected, tmp_path, to, monkeypatch):
    write(selected, tmp_path / "out", to, 3)
    known = contents(tmp_path / "out")

    def broken(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainers, "content_digest", broken)
    monkeypatch.setattr(trainers, "image_ending", lambda data, pair: broken(data))
    with pytest.raises(FifaError, match="No space left"):
        write(selected, tmp_path / "out", to)
    assert contents(tmp_path / "out") == known
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bytes_that_are_no_image_are_refused():
    for data in (b"", b"GIF89a", b"<svg", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftypheic"):
        with pytest.raises(FifaError, match=r"neither JPEG, PNG, WEBP nor AVIF(.|\n)*pair p7"):
            trainers.image_ending(data, "p7")


def test_the_command_writes_beside_the_subset(shipped, tmp_path):
    recipe = Recipe(
        read=Read(source=str(shipped)),
        score=Score(("column:clipscore_0,clipscore_1",), quality="none", diversity="none"),
        select=Select(keep=4),
    )
    run = fifa.filter_pairs(recipe, tmp_path / "run")
    done = CliRunner().invoke(cli, ["export", str(run.folder), "--to", "simpletuner"])
    assert done.exit_code == 0
    folder = run.folder / "subset-simpletuner"
    assert str(folder) in done.output
    assert len(list((folder / "win").iterdir())) == 8
    assert (run.subset / "subset.json").exists()
    done = CliRunner().invoke(cli, ["export", str(run.folder), "--to", "kohya"])
    assert done.exit_code != 0 and "no such target" in str(done.exception)


def test_the_command_fetches_images_where_that_is_allowed(world, tmp_path, monkeypatch):
    urls = [f"https://example.org/{side}.png" for side in (0, 1)]
    row = {"prompt": "p", "image_0": urls[0], "image_1": urls[1], "label": 1, "good_0": 2.0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | {"good_1": 1.0}))
    recipe = Recipe(
        read=Read(source=str(tmp_path / "pairs.jsonl")),
        score=Score(("column:good_0,good_1",), quality="none", diversity="none"),
    )
    run = str(fifa.filter_pairs(recipe, tmp_path / "run").folder)
    files = (world / "0-0.png", world / "0-1.jpg")
    images = {url: file.read_bytes() for url, file in zip(urls, files, strict=True)}
    monkeypatch.setattr("fifa.data.refs.fetch", lambda url, max_bytes: images[url])
    done = CliRunner().invoke(cli, ["export", run, "--to", "simpletuner"])
    assert "simpletuner needs the images" in str(done.exception)
    done = CliRunner().invoke(cli, ["export", run, "--to", "simpletuner", "--allow-download"])
    assert done.exit_code == 0, done.output
    (win,) = (tmp_path / "run/subset-simpletuner/win").glob("*.png")
    (lose,) = (tmp_path / "run/subset-simpletuner/lose").glob("*.png")
    assert [win.read_bytes(), lose.read_bytes()] == list(images.values())
