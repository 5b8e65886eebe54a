"""Rubrics learned from labels: which questions are kept, and that their folder scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from endpoint_server import VLM, completion, server
from test_judge_server import bright, difference, judged, opened, opened_url, some, source

import commands
import fifa
from fifa.errors import FifaError
from fifa.scoring.judges.questions import fit_l1

QUESTIONS = ["Is it bright?", "Is it dark?", "Is it square?", "Is it by chance?"]


class Answering(VLM):
    """Writes questions, and answers them by the image's brightness; "chance" by its bytes."""

    async def __call__(self, request: Any, body: Any) -> Any:
        parts = body["messages"][-1]["content"]
        text = "".join(part.get("text", "") for part in parts)
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        self.good[text, *urls] += 1
        if "Write questions" in text:
            assert opened_url(urls[0]) > opened_url(urls[1]), "the preferred one comes first"
            return web.json_response(completion(json.dumps({"questions": [*QUESTIONS, "{x}?"]})))
        light, chance = opened_url(urls[0]), len(urls[0]) % 2
        words = {"bright": light > 128, "dark": light <= 128, "square": True, "chance": chance}
        said = {
            name: "yes" if next((v for word, v in words.items() if word in line), False) else "no"
            for name, line in re.findall(r"(q\d+): (.*)", text)
        }
        return web.json_response(completion(json.dumps(said)))


def test_the_questions_that_tell_are_kept_and_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in some(24) if (opened(row[1]) - opened(row[2])) * (row[3] - 0.5) > 0]
    path, out = source(tmp_path, rows), tmp_path / "rubric"
    pairs = fifa.read_pairs(path)
    vlm = Answering()
    with server(vlm) as url:
        arguments = ("reward", "rubric", path, "--judge", f"vlm:m@{url}", "--out", out)
        done = commands.fifa(*arguments)
        assert done.returncode == 0, done.stderr
        settings = json.loads((out / "reward.json").read_text("utf-8"))
        worth = dict(zip(settings["questions"], settings["weights"], strict=True))
        assert worth["Is it bright?"] > 0 or worth["Is it dark?"] < 0
        assert "Is it square?" not in worth
        card = (out / "README.md").read_text("utf-8")
        assert f"| {settings['weights'][0]:+.3f} | {settings['questions'][0]} |" in card
        assert "--margin rubric:FOLDER" in card
        assert settings["metrics"]["after"]["accuracy"] > 0.6
        assert set(vlm.good.values()) == {1}
        before = sum(vlm.good.values())
        table = judged(pairs, f"rubric:{out}", tmp_path / "scores")
        assert sum(vlm.good.values()) > before
        apart = np.abs(difference(table)) > 0
        assert (np.sign(difference(table)) == np.sign(bright(pairs)))[apart].all()
        assert apart.mean() > 0.3
        (tmp_path / "q.txt").write_text("# a remark\nIs it square?\n", "utf-8")
        done = commands.fifa(*arguments[:-1], tmp_path / "no", "--questions", tmp_path / "q.txt")
        assert "none of 1 questions tells what people prefer" in done.stderr
    (out / "reward.json").write_text("{}", "utf-8")
    with pytest.raises(FifaError):
        judged(pairs, f"rubric:{out}")


def test_the_fit_is_where_the_gradient_and_the_penalty_balance() -> None:
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 0.0, 0.3, 1.0], (200, 6))
    label = (rng.random(200) < 1 / (1 + np.exp(-x @ [2, -1, 0.5, 0, 0, 0]))).astype(float)
    weight = rng.choice([0.5, 1.0], 200)
    kept = []
    for penalty in (0.1, 0.02, 0.0):
        w = fit_l1(x, label, weight, penalty)
        gradient = x.T @ (weight / weight.sum() * (1 / (1 + np.exp(-x @ w)) - label))
        kept.append(int((w != 0).sum()))
        assert gradient[w != 0] == pytest.approx(-penalty * np.sign(w[w != 0]), abs=1e-6)
        assert (np.abs(gradient) <= penalty + 1e-6).all()
    assert kept[0] == 1
    assert kept[2] == 6
