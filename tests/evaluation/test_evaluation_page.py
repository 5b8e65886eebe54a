import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from drawn import draw_index, save, write_evaluation, write_results

from fifa.errors import FifaError
from fifa.evaluation.generate import png, read_index
from fifa.evaluation.judges import COLOURS
from fifa.evaluation.measure import load_measured
from fifa.evaluation.results import load_results
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.results import vote_results
from fifa.evaluation.win_rates import comparisons, diversity_levels, levels
from fifa.reporting.evaluation import headline, symptoms
from fifa.reporting.examples import EACH, EXACT, MODELS, side_by_side, thumbnail
from fifa.reporting.page import write_report
from fifa.shards.files import write_table
from neighbours import helper

HOSTILE = '<img src=x onerror="alert(1)"> \u202e {}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    return write_evaluation(
        run, ["fifa", "random"], [0.8, 0.1], curve=(10, 20, 30), images=True, unsafe=True
    )


@pytest.fixture(scope="module")
def text(run):
    return write_report(run).read_text("utf-8")


def words(text):
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body))


def test_the_verdict_is_that_of_the_first_independent_scorer(run, text):
    found = comparisons(load_measured(run / "evaluate"))
    best = headline(found)
    assert (best.ours, best.theirs, best.scale.name) == ("fifa", "base", "t")
    verdict = re.search(r'<p class="verdict">.*?</p>', text, re.DOTALL).group()
    assert f"{best.wins.share:.1%}".replace("%", " %") in words(verdict)
    assert f"{best.wins.low * 100:.1f} to {best.wins.high * 100:.1f} %" in words(text)
    assert "picked the data" in words(text)


def test_without_an_independent_scorer_the_verdict_says_so(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.5], scorers=("s",))
    told = words(write_report(run).read_text("utf-8"))
    assert "by s, the scorer that picked its data" in told
    assert "no evidence of quality" in told


def test_a_difference_that_is_not_established_is_not_sold(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.0], scorers=("t",))
    assert "The interval holds 50 %" in words(write_report(run).read_text("utf-8"))


def test_a_checkpoint_that_loses_is_not_called_a_winner(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [-0.9], scorers=("t",))
    told = words(write_report(run).read_text("utf-8"))
    assert "No checkpoint wins more often than the base; the best of them, a," in told


def test_wins_and_mean_that_disagree_are_told(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [-0.05], scorers=("t",), spread=0.0)
    folder = run / "evaluate"
    found = load_measured(folder)
    values = found.table["t"].to_numpy().copy()
    values[24:34] += 2  # of five prompts' images, far more than all the others lose
    place = found.table.schema.get_field_index("t")
    table = found.table.set_column(place, "t", pa.array(values, pa.float32()))
    save(replace(found, table=table), folder)
    write_results(run, load_results(folder).models, {})
    told = words(write_report(run).read_text("utf-8"))
    assert "loses often by little and wins rarely by much" in told


def test_every_win_rate_is_on_the_page(run, text):
    told = words(text)
    for c in comparisons(load_measured(run / "evaluate")):
        assert f"{c.wins.low * 100:.1f} to {c.wins.high * 100:.1f} %" in told
        assert f"{c.wins.wins}, {c.wins.ties}, {c.wins.losses}" in told


def test_side_by_side_are_best_median_and_worst_at_the_first_seed(run):
    folder = run / "evaluate"
    found, images = load_measured(folder), read_index(folder)
    scale = headline(comparisons(found)).scale
    groups, hidden = side_by_side(folder, images, found, "fifa", scale)
    assert hidden == 2
    rows = found.table.to_pylist()
    gains = {}
    for row in rows:
        if row["model"] == "fifa" and not row["unsafe_prompt"]:
            base = next(
                r
                for r in rows
                if (r["model"], r["prompt_id"], r["seed"])
                == ("base", row["prompt_id"], row["seed"])
            )
            gains.setdefault(row["prompt_id"], []).append(row["t"] - base["t"])
    order = sorted((float(np.mean(g)) for g in gains.values()), reverse=True)
    assert len(order) == 10
    best, median, worst = ([p["gain"] for p in group["prompts"]] for group in groups)
    assert best == pytest.approx(order[:3])
    assert worst == pytest.approx(order[-3:])
    assert set(np.round(median, 6)) < set(np.round(order[3:-3], 6))
    assert "gains most" in groups[0]["title"]
    first = {}
    for row in images.to_pylist():
        first.setdefault(row["prompt"], row["seed"])
    for group in groups:
        for prompt in group["prompts"]:
            assert prompt["seed"] == first[prompt["prompt"]]
            assert [cell["model"] for cell in prompt["cells"]] == ["base", "fifa", "random"]


def test_what_is_unsafe_is_not_in_the_page(run, text):
    images = read_index(run / "evaluate").to_pylist()
    flagged = images[0]["prompt"]
    assert flagged not in text
    assert "2 prompts flagged as unsafe are left out" in words(text)


def test_an_image_that_the_detector_holds_for_unsafe_is_left_out(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [1.0], images=True, unsafe=True)
    folder = run / "evaluate"
    found = load_measured(folder)
    groups, _ = side_by_side(folder, read_index(folder), found, "a", found.scales[1])
    shown = {
        (prompt["prompt"], cell["model"]): cell["image"]
        for group in groups
        for prompt in group["prompts"]
        for cell in prompt["cells"]
    }
    row = found.table.to_pylist()[4]
    assert row["detector"] > 0.5
    prompt = read_index(folder)["prompt"][4].as_py()
    if (prompt, "base") in shown:
        assert shown[prompt, "base"].startswith("left out")
    kept = [image for key, image in shown.items() if key != (prompt, "base")]
    assert all(image.startswith("data:image/png;base64,") for image in kept)


def test_hostile_prompts_are_shown_and_never_obeyed(tmp_path):
    run = write_evaluation(tmp_path / "run", ["<b>a</b>"], [0.5], images=True, prompt=HOSTILE)
    text = write_report(run).read_text("utf-8")
    assert "<img src=x" not in text
    assert "<b>a</b>" not in text
    assert "\u202e" not in text
    assert "&lt;img src=x" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "default-src 'none'" in text


def test_the_same_files_give_the_same_bytes(run, text):
    assert write_report(run).read_text("utf-8") == text


def test_identifiers_are_there_once_and_everything_used_is_there(text):
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


def test_safety_and_cost_and_curves_are_told(text):
    told = words(text)
    assert "safe, on unsafe prompts" in told
    assert "1 min 05 s" in told  # 5 s of scoring and 60 s of training
    assert "Time to match" not in told  # one training has a curve
    assert "spread of the last checkpoints" in told


def test_signs_of_hacking_are_found_where_they_are(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.0], scorers=("t",))
    found = load_measured(run / "evaluate")
    rows = found.table.to_pylist()
    values = [row["brightness"] + (0.5 if row["model"] == "a" else 0) for row in rows]
    place = found.table.schema.get_field_index("brightness")
    table = found.table.set_column(place, "brightness", pa.array(values, pa.float32()))
    changed = type(found)(table, found.scales, found.diversity)
    colours = {name: levels(changed, name) for name in COLOURS}
    found = symptoms(["a"], comparisons(changed), diversity_levels(changed), colours)
    assert "shift in brightness" in {symptom.name for symptom in found if symptom.present}
    names = {symptom.name for symptom in found}
    assert names >= {"shift in contrast", "less varied images of one prompt"}


def test_votes_of_people_come_first(run, text, tmp_path):
    assert "What people say" not in text
    copy = shutil.copytree(run, tmp_path / "run")
    ballot = Ballot(copy)
    assert "What people say" not in write_report(copy).read_text("utf-8")  # nobody has voted yet
    ballot.register("ada", "ada")
    for position in range(40):
        trial = ballot.store.place("ada").trials[0]
        ours_left = trial.left == 0  # the first image of a comparison is ours
        answer = "tie" if position % 4 == 0 else "left" if ours_left else "right"
        assert ballot.store.vote("ada", position, answer)
    told = words(write_report(copy).read_text("utf-8"))
    first = next(v for v in vote_results(copy).verdicts if v.theirs == "base")
    assert re.search(r"People prefer \w+ to base in [\d.]+ % of their votes", told)
    assert f"{first.rate.wins}, {first.rate.ties}, {first.rate.losses}" in told
    assert "by 1 voter on" in told


def test_a_run_that_was_filtered_and_evaluated_has_both_on_one_page(tmp_path):
    runs = helper("reporting", "report_runs")
    runs.make_run(tmp_path / "run")
    alone = words(write_report(tmp_path / "run").read_text("utf-8"))
    write_evaluation(tmp_path / "run", ["a"], [0.9])
    text = write_report(tmp_path / "run").read_text("utf-8")
    told = words(text)
    places = [told.index(part) for part in ("a wins", "Win rates", "Kept 80 of 400")]
    assert places == sorted(places)
    for section in ("From rows to the subset", "Which prompts are left", "Time and tokens"):
        assert section in alone
        assert section in told
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_measures_of_other_images_are_refused(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.9])
    write_table(run / "evaluate" / "images.parquet", draw_index(["base", "b"]))
    with pytest.raises(FifaError, match="the images have changed"):
        write_report(run)


def test_an_evaluation_without_measures_says_what_to_do(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.9])
    (run / "evaluate" / "results.json").unlink()
    with pytest.raises(FifaError, match="nothing has been measured here yet"):
        write_report(run)


def test_two_trainings_have_their_time_to_match_with_selecting(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a", "b"], [0.9, 0.2], curve=(10, 20), curves=2)
    told = words(write_report(run).read_text("utf-8"))
    assert "Time to match another" in told
    assert "20.0 s" in told  # ten steps of 1.5 s, and 5 s of scoring


def test_the_page_is_light_enough_to_mail():
    noise = np.random.default_rng(0).integers(0, 256, (768, 768, 3), np.uint8)
    heaviest = len(thumbnail(png(noise), exact=EXACT))
    assert 3 * EACH * MODELS * heaviest < 3_000_000


def test_a_phone_need_not_scroll_sideways(run, text, page_widths):
    for width in (390, 1280):
        content, window = page_widths(run / "report.html", width)
        assert content <= window <= width
