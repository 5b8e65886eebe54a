"""On a real Ray cluster of this machine: two actors, one of which is killed in mid-run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from steps import EXPECTED, KEYS, SHARDS, Squares, squares_of  # noqa: E402

import fifa  # noqa: E402
from fifa.errors import FifaError  # noqa: E402
from fifa.shards.ledger import Ledger  # noqa: E402
from fifa.shards.pool import Shard, run_shards  # noqa: E402
from fifa.shards.ray import RayPool  # noqa: E402

SOURCE = str(Path(fifa.__file__).parents[1])
REWARDS = str(Path(__file__).parents[1] / "scoring" / "rewards")


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([SOURCE, REWARDS, str(Path(__file__).parent)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            configure_logging=False,
        )
        yield
        ray.shutdown()


def test_an_actor_that_is_killed_loses_nothing(cluster, tmp_path):
    make = partial(Squares, tmp_path / "died", 0.02)
    ledger = Ledger(str(tmp_path / "parts"))
    shards = [Shard(key, len(shard), shard) for key, shard in zip(KEYS, SHARDS, strict=True)]
    pool = RayPool(workers=2, num_cpus=0.5)
    assert squares_of(run_shards("squares", make, shards, ledger, pool)) == EXPECTED
    assert (tmp_path / "died").exists()
    assert ledger.keys() == set(KEYS)


def test_images_scored_on_a_cluster_give_the_bytes_of_the_local_pool(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(REWARDS)
    from tiny import Fragile, Tiny, recurring

    from fifa.config import Compute
    from fifa.scoring.rewards.engine import score_pairs

    pairs, _ = recurring(tmp_path / "data", pairs=60)
    compute = Compute(batch=4, workers=1)
    score_pairs(pairs, Tiny(), folder=tmp_path / "here", compute=compute, shard=5)
    score_pairs(
        pairs,
        Tiny(),
        folder=tmp_path / "there",
        compute=replace(compute, store=str(tmp_path / "shared")),
        shard=5,
        executor=RayPool(workers=2, num_cpus=0.5),
        load=partial(Fragile, tmp_path / "died"),
    )
    assert (tmp_path / "died").exists()
    files = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == files
    assert list((tmp_path / "shared").iterdir()) == []


def test_every_step_of_scoring_gives_the_same_bytes_on_a_cluster(cluster, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REWARDS)
    monkeypatch.syspath_prepend(str(Path(REWARDS).parent))
    from feedback import write_feedback
    from tiny_lm import byte_tokenizer, tiny_llama
    from tiny_models import write_clip
    from transformers import PreTrainedTokenizerFast

    from fifa.config import Compute
    from fifa.console import collect_facts
    from fifa.scoring import diversity, encoders, quality, score
    from fifa.scoring.rewards import features

    for module, name in ((encoders, "SHARD"), (quality, "SHARD"), (diversity, "QUERIES")):
        monkeypatch.setattr(module, name, 3)
    monkeypatch.setattr(features, "SHARD", 16)
    model, clip = tmp_path / "lm", f"clip:{tmp_path / 'clip'}"
    tiny_llama().save_pretrained(model)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(model)
    write_clip(tmp_path / "clip", image_size=64)
    pairs = write_feedback(tmp_path / "pairs")
    asked = {"margin": f"proxy@{clip}", "quality": f"local:{model}", "diversity": clip, "k": 3}

    def scored(name, compute):
        with collect_facts() as facts:
            score(pairs, **asked, folder=tmp_path / name, compute=compute)
        return facts, {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    here, files = scored("here", Compute())
    cluster = Compute(executor="ray", actors=2, num_cpus=0.5, store=str(tmp_path / "shared"))
    assert scored("there", cluster) == (here, files)
    assert here["prompts_rated"] == pairs.prompts.num_rows > 6
    assert len(files) >= 5
    assert list((tmp_path / "shared").iterdir()) == []


def test_an_error_of_the_step_reaches_the_person(cluster, tmp_path):
    ledger = Ledger(str(tmp_path / "parts"))
    with pytest.raises(FifaError, match="cannot be squared"):
        list(RayPool(num_cpus=0.5).map(Squares, [("a", ["seven"])], ledger))


def test_workers_that_fit_nowhere_are_refused_and_not_waited_for(cluster, tmp_path):
    pool = RayPool(workers=1, num_gpus=1)
    with pytest.raises(FifaError, match="ask for 1 GPUs, the cluster has 0"):
        list(pool.map(Squares, [("a", [1])], Ledger(str(tmp_path))))


def test_no_shards_need_no_actors(cluster, tmp_path):
    assert list(RayPool(num_cpus=0.5).map(Squares, [], Ledger(str(tmp_path)))) == []


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FifaError, match=r"fifa-align\[ray\]"):
        list(RayPool().map(Squares, [("a", [1])], Ledger(str(tmp_path))))
