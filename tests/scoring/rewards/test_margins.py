import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from feedback import write_feedback
from PIL import Image
from tiny_models import write_clip

import commands
import fifa
from fifa.config import Read, Recipe, Score, Select
from fifa.errors import FifaError
from fifa.models.transformer import ModelEncoder
from fifa.run.steps import filter_pairs
from fifa.scoring.rewards import load_reward
from fifa.scoring.rewards import score as score_in_memory


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    write_clip(folder)
    return folder


def test_a_margin_from_pixels_is_the_models_own(tmp_path, clip):
    pairs = write_feedback(tmp_path / "source", prompts=3, each=2)
    spec = f"pickscore:{clip}"
    scores = fifa.score(pairs, margin=spec, quality="none", diversity="none")
    model = load_reward(spec, device="cpu")
    for side in (0, 1):
        images = [
            Image.open(io.BytesIO((tmp_path / "source" / ref).read_bytes()))
            for ref in pairs.table[f"image_{side}_ref"].to_pylist()
        ]
        expected = score_in_memory(model, pairs.table["prompt"].to_pylist(), images)
        np.testing.assert_allclose(scores.margins[spec][f"reward_{side}"], expected, atol=1e-4)


def test_the_diversity_step_finds_the_prompts_that_the_scorer_embedded(tmp_path, clip, monkeypatch):
    pairs = write_feedback(tmp_path / "source", prompts=4, each=1)
    specs = {"margin": f"pickscore:{clip}", "quality": "none", "folder": tmp_path / "scores"}
    fifa.score(pairs, diversity="none", **specs)
    monkeypatch.setattr(ModelEncoder, "embed", lambda *_: pytest.fail("embedded twice"))
    scores = fifa.score(pairs, diversity=f"clip:{clip}", **specs)
    assert scores.diversity.num_rows == 4


def test_an_image_that_the_scorer_cannot_open_is_the_pairs_reason(tmp_path, clip):
    write_feedback(tmp_path / "source", prompts=4, each=2, broken=("1-0-1.png",))
    recipe = Recipe(
        read=Read(source=str(tmp_path / "source")),
        score=Score(margin=(f"pickscore:{clip}",), quality="none", diversity="none"),
        select=Select(keep=1.0),
    )
    run = filter_pairs(recipe, tmp_path / "run")
    reasons = pq.read_table(run.folder / "selection.parquet")["reason"].to_pylist()
    assert reasons.count("unreadable_image") == 1
    assert reasons.count("selected") == 7


def test_a_proxy_is_trained_and_used_from_the_command_line(tmp_path):
    source = tmp_path / "source"
    write_feedback(source, prompts=8, each=3)
    out = tmp_path / "reward"
    train = ["reward", "train", str(source), "--out", str(out), "--text", "none"]
    score = ["score", str(source), "--margin", f"proxy:{out}", "--out", str(tmp_path / "run")]
    for command in (train, [*score, "--quality", "none", "--diversity", "none"]):
        done = commands.fifa(*command)
        assert done.returncode == 0, done.stderr
    assert (out / "README.md").exists()
    assert len(list((tmp_path / "run" / "scores").glob("margin-*.parquet"))) == 1


@pytest.mark.parametrize(
    ("spec", "says"), [("pickscore:nowhere", "nowhere"), ("proxy:nowhere", "nowhere")]
)
def test_a_model_that_is_not_there_is_named(tmp_path, spec, says):
    pairs = write_feedback(tmp_path / "source", prompts=2, each=1)
    with pytest.raises(FifaError, match=says):
        fifa.score(pairs, margin=spec, quality="none", diversity="none")
