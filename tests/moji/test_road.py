"""The whole road through the commands, on tiny models of the world: score, select, train, judge."""

import json
from itertools import islice

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from fifa.cli import cli
from fifa.moji.world import caption, scenes
from moji.sizes import write_tiny


def run(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("method", ["lora", "full"])
def test_from_feedback_to_a_report(shipped, tmp_path, method):
    sd, clip = write_tiny(tmp_path)
    scorer, small = f"clipscore:{clip}", ["--device", "cpu"]
    filtered, checkpoint, judged = (tmp_path / name for name in ("run", "checkpoint", "judged"))
    margin = ["--margin", scorer, "--quality", "none", "--diversity", f"clip:{clip}"]
    # weights that nobody trained are near chance
    run("filter", shipped, *margin, "--keep", "8", "--anyway", "--out", filtered, *small)
    training = ["--method", method, "--steps", "2", "--batch", "4", "--tracker", "none", *small]
    run("train", filtered, "--model", sd, "--out", checkpoint, *training)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(caption(scene) for scene in islice(scenes(seen=False), 3)))
    models = ["--base", sd, "--tuned", f"tuned={checkpoint}", "--score", scorer]
    sampler = ["--encoder", f"clip:{clip}", "--steps", "2", "--seeds", "2", "--batch", "6"]
    run("evaluate", *models, "--prompts", prompts, *sampler, "--out", judged, *small)
    images = pq.read_table(judged / "evaluate" / "images.parquet")
    assert sorted(set(images["model"].to_pylist())) == ["base", "tuned"]
    assert images.num_rows == 2 * 3 * 2
    found = json.loads((judged / "evaluate" / "results.json").read_text())["comparisons"]
    assert {c["ours"] for c in found} == {"tuned"}
    assert any(c["scale"]["name"].startswith("clipscore") for c in found)
    report = (judged / "report.html").read_text("utf-8")
    (judged / "report.html").unlink()
    run("report", judged)
    assert (judged / "report.html").read_text("utf-8") == report
