"""The feedback's builder: the shipped world comes from its seed, and other worlds from knobs."""

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fifa.data import read_pairs
from fifa.moji.family import FEEDBACK, TRUTH, generate, load_sd
from fifa.moji.world import asked
from moji.feedback import CROWD, chain, crowd_of, first_noise, prompts, wanted, write_feedback
from moji.sizes import write_tiny


def plan(crowd):
    rng = np.random.default_rng(crowd.seed)
    wishes = prompts(rng, crowd)
    shows = [list(chain(wish.pairs, rng, crowd)) for wish in wishes]
    return wishes, wanted(wishes, shows, crowd)


def test_the_shipped_feedback_is_what_its_seed_asks_for():
    _, pictures = plan(CROWD)
    truth = pq.read_table(TRUTH).to_pydict()
    assert pictures.uid == truth["image_uid"]
    assert (pictures.prompt, pictures.kind) == (truth["prompt"], truth["kind"])
    rows = pq.read_table(FEEDBACK, columns=["image_0_uid", "jpg_0"]).to_pydict()
    jpeg = dict(zip(rows["image_0_uid"], rows["jpg_0"], strict=True))
    some = [i for i, uid in enumerate(pictures.uid) if uid in jpeg][:4]
    noise = torch.stack([first_noise(pictures.family[i], i, CROWD.near) for i in some])
    asked_for = [pictures.prompt[i] for i in some]
    drawn = generate(
        load_sd(), asked_for, some, noise=noise, guidance=CROWD.guidance, steps=CROWD.steps
    )
    for i, pixels in zip(some, drawn, strict=True):
        shipped = np.asarray(Image.open(io.BytesIO(jpeg[pictures.uid[i]])), int)
        assert np.abs(pixels - shipped).mean() < 4  # JPEG, and weights that are stored in float16


def test_a_world_of_another_size_keeps_its_kinds_and_has_every_prompt_once():
    assert replace(crowd_of(3300), dtype="float32") == CROWD
    cases = {
        (): 1961,
        (("nonsense", 0.3),): 1961,
        (("reworded", 0.0),): 970,  # there are only as many plain prompts as scenes
        (("reworded", 0.6),): 1960,
        (("unsafe", 0.3),): 1960,
    }
    for shares, expected in cases.items():
        crowd = crowd_of(33_000, **dict(shares))
        wishes = prompts(np.random.default_rng(crowd.seed), crowd)
        texts = [wish.prompt for wish in wishes]
        assert len(texts) == expected and len(set(texts)) >= expected - 2  # gibberish may recur
        assert sum(wish.pairs for wish in wishes) == pytest.approx(33_000, abs=40)
        assert wishes[0].pairs == 190 and wishes[-1].pairs < 12
        for kind, share in shares:
            assert np.mean([w.kind == kind for w in wishes]) == pytest.approx(share, abs=0.001)
        nothing = [asked(wish.prompt) is None for wish in wishes]
        assert nothing == [wish.kind == "nonsense" for wish in wishes]
    for shares in ({"nonsense": 0.9}, {"reworded": 0.8}, {"unsafe": -0.1}):
        with pytest.raises(SystemExit, match="too few plain prompts"):
            crowd_of(3300, **shares)


def test_a_world_that_was_killed_goes_on_with_the_same_bytes(tmp_path):
    sd, _ = write_tiny(tmp_path)
    crowd = replace(crowd_of(70, unsafe=0.2, seed=3), steps=2)
    files = [tmp_path / name for name in ("feedback.parquet", "truth.parquet")]
    write_feedback(sd, tmp_path, *files, crowd)
    first = [path.read_bytes() for path in files]
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert len(drawn) > 1
    drawn[0].unlink()
    write_feedback(sd, tmp_path, *files, crowd)
    assert [path.read_bytes() for path in files] == first
    pairs = read_pairs(files[0])
    assert (pairs.origin.format, len(pairs)) == ("pickapic", 70)
    images = {*pairs.table["image_0"].to_pylist(), *pairs.table["image_1"].to_pylist()}
    assert images == set(pq.read_table(files[1])["image_uid"].to_pylist())
