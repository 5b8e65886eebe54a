"""Quality scores: resumed to the byte, never mixed, and clear about what is not there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import transformers
from tiny_lm import byte_tokenizer, tiny_llama

import fifa
from fifa.config import UNSAFE_FLAGS, Compute, Measure
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.evaluation import measure
from fifa.scoring import quality
from fifa.scoring.quality import make_rater, quality_scores
from fifa.scoring.raters import local
from fifa.scoring.raters.local import LogitRater
from fifa.scoring.rubric import FLAGS, RATINGS

PROMPTS_HERE = ["a cat", "two dogs on a beach, oil painting", "ü 日本", "x", "A" * 300, "<s>x</s>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of our own, saved as anybody's."""
    path = tmp_path_factory.mktemp("tiny-lm")
    tiny_llama().save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(path)
    return path


def pairs_of(prompts: list[str]) -> Pairs:
    ids = [f"p{i}" for i in range(len(prompts))]
    return Pairs(PAIRS.empty_table(), pa.table([ids, prompts], schema=PROMPTS))


def test_a_killed_rating_goes_on_where_it_was_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "SHARD", 2)
    pairs, spec = pairs_of(PROMPTS_HERE), f"local:{folder}"
    table = quality_scores(pairs, spec, folder=tmp_path / "unbroken")
    rate, calls = LogitRater.rate, []

    def killed(self: LogitRater, prompts: list[str]) -> pa.Table:
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rate(self, prompts)

    monkeypatch.setattr(LogitRater, "rate", killed)
    with pytest.raises(KeyboardInterrupt):
        quality_scores(pairs, spec, folder=tmp_path / "broken")
    assert quality_scores(pairs, spec, folder=tmp_path / "broken").equals(table)
    assert calls[1:] == [PROMPTS_HERE[i : i + 2] for i in (2, 2, 4)]
    files = [sorted((tmp_path / name).iterdir()) for name in ("unbroken", "broken")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert len(files[0]) == 1
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    quality_scores(pairs, spec, folder=tmp_path / "broken")
    assert len(calls) == 4  # a finished file is not rated again
    assert table.column_names == ["prompt_id", *RATINGS.names]
    assert table["prompt_id"].to_pylist() == pairs.prompts["prompt_id"].to_pylist()


def test_another_models_ratings_never_mix(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama().double().save_pretrained(other)
    assert LogitRater(str(folder)).identity != LogitRater(str(other)).identity


def test_a_rater_computes_where_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, seen = local.load_reader, []

    def recorded(path: Path, device: str, dtype: str) -> object:
        seen.append(device)
        return load(path, "cpu", "float32")

    monkeypatch.setattr(local, "load_reader", recorded)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fifa.scoring.raters.logits.best_dtype", lambda device: "bfloat16")
    pairs, spec = pairs_of(["a cat"]), f"local:{folder}"
    for compute in (Compute(), Compute(device="cpu")):
        fifa.score(pairs, (), spec, "none", compute=compute)
    images = pa.table({"prompt_id": ["a"], "prompt": ["a cat"], "category": ["x"]})
    there = Compute(device="cpu")
    measure._unsafe_prompts(images, Measure(rater=spec), folder / "measured", there)
    again = pickle.loads(pickle.dumps(make_rater(spec, device="cpu")))  # in a worker
    again.rate(["a cat"])
    assert seen == ["cuda", "cpu", "cpu", "cpu"]
    assert make_rater("local", device="cpu").encoder.device == "cpu"


def test_a_model_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FifaError, match="at-all"):
        quality_scores(pairs_of(["a"]), "local:./nowhere/at-all")
    with pytest.raises(FifaError, match="no such rater"):
        make_rater("lokal")


def test_no_prompts_give_no_ratings(folder: Path) -> None:
    assert quality_scores(pairs_of([]), f"local:{folder}").num_rows == 0


def test_every_flag_of_the_rubric_is_known_to_the_selection() -> None:
    assert set(FLAGS) - {"nonsense"} < set(UNSAFE_FLAGS)
