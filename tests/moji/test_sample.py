"""Parts of a world with other shares of its kinds of prompts."""

from collections import Counter

import pyarrow.parquet as pq
import pytest

from fifa.moji.family import FEEDBACK, TRUTH
from fifa.moji.world import asked
from moji.sample import sample_feedback


def pairs_by_prompt(feedback):
    columns = ["caption", "image_0_uid", "image_1_uid"]
    rows = {tuple(row.values()) for row in pq.read_table(feedback, columns=columns).to_pylist()}
    return Counter(prompt for prompt, *_ in rows)


@pytest.mark.parametrize(
    "shares", [{}, {"nonsense": 0.2}, {"unsafe": 0.3, "nonsense": 0.0}, {"reworded": 0.5}]
)
def test_a_part_has_the_shares_that_were_asked_for_and_whole_pairs(tmp_path, shares):
    sample_feedback(FEEDBACK.parent, tmp_path, 600, shares, seed=3)
    truth = pq.read_table(TRUTH).to_pylist()
    kind = {row["prompt"]: row["kind"] for row in truth}
    whole, part = (pairs_by_prompt(path) for path in (FEEDBACK, tmp_path / "feedback.parquet"))
    counts = Counter()
    for prompt, count in part.items():
        counts[kind[prompt]] += count
    assert part.total() == 600 and part <= whole
    for name, share in shares.items():
        assert counts[name] == pytest.approx(600 * share, abs=1)
    free = {name for name in counts if name not in shares}
    world = {name: sum(n for prompt, n in whole.items() if kind[prompt] == name) for name in free}
    for name in free:
        ratio = counts[name] / sum(counts[other] for other in free)
        assert ratio == pytest.approx(world[name] / sum(world.values()), abs=0.01)
    cut = [prompt for prompt in part if part[prompt] < whole[prompt]]
    assert len(cut) <= len(counts)  # one prompt of a kind has fewer pairs at most
    # all answers of a pair are there or none, and every image has its truth
    rows = pq.read_table(tmp_path / "feedback.parquet")
    uids = {*rows["image_0_uid"].to_pylist(), *rows["image_1_uid"].to_pylist()}
    assert uids == set(pq.read_table(tmp_path / "truth.parquet")["image_uid"].to_pylist())
    sides = ["image_0_uid", "image_1_uid"]
    every, kept = (
        Counter(tuple(row.values()) for row in table.select(sides).to_pylist())
        for table in (pq.read_table(FEEDBACK), rows)
    )
    assert all(every[pair] == count for pair, count in kept.items())


def test_prompts_of_one_scene_stay_together_and_too_few_pairs_are_told(tmp_path):
    sample_feedback(FEEDBACK.parent, tmp_path, 400, {"reworded": 1.0}, seed=1)
    scenes = Counter(asked(prompt) for prompt in pairs_by_prompt(tmp_path / "feedback.parquet"))
    world = Counter(
        asked(row["prompt"])
        for row in {r["prompt"]: r for r in pq.read_table(TRUTH).to_pylist()}.values()
        if row["kind"] == "reworded"
    )
    assert sum(scenes[scene] == world[scene] for scene in scenes) >= len(scenes) - 1
    with pytest.raises(SystemExit, match="nonsense pairs are wanted"):
        sample_feedback(FEEDBACK.parent, tmp_path, 3000, {"nonsense": 0.9}, seed=1)
    with pytest.raises(SystemExit, match="between 0 and 1"):
        sample_feedback(FEEDBACK.parent, tmp_path, 300, {"nonsense": 0.7, "unsafe": 0.5}, seed=1)
