"""Vision-language judges against servers of every style: all pairs judged, none twice, no leak."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from endpoint_server import VLM, brightness, completion, server
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from PIL import Image
from pydantic import TypeAdapter

import commands
import fifa
from fifa.config import Compute, Read, Recipe, Score, Select
from fifa.data.images import unique_images
from fifa.errors import FifaError
from fifa.run.folder import start_run
from fifa.scoring.judges import pictures
from fifa.scoring.margin import image_rewards
from fifa.scoring.rewards import load_reward
from fifa.scoring.table import score_facts
from fifa.shards.files import read_table

KEY = "sk-not-to-be-seen-4711"
ONE = Compute(in_flight=1)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def picture(light: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (light, light, light)).save(out, kind)
    return out.getvalue()


def source(folder: Path, rows: list[tuple[str, bytes, bytes, float]]) -> Path:
    """A file in diffusers' schema: prompt, both images, the label of the first."""
    names = ("caption", "jpg_0", "jpg_1", "label_0")
    path = folder / "pairs.parquet"
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path
    )
    return path


def some(n: int) -> list[tuple[str, bytes, bytes, float]]:
    """Pairs of which the brighter image won, but every fifth."""
    rows = []
    for i in range(n):
        a, b = 40 + 6 * (i % 24), 221 - 10 * (i % 20)
        rows.append((f"prompt {i}", picture(a), picture(b), float((a > b) != (i % 5 == 0))))
    return rows


@pytest.fixture
def pairs(tmp_path: Path) -> fifa.Pairs:
    return fifa.read_pairs(source(tmp_path, some(12)))


def judged(pairs: Any, spec: Any, folder: Path | None = None, **options: Any) -> pa.Table:
    options = {"quality": "none", "diversity": "none", **options}
    scores = fifa.score(pairs, margin=spec, folder=folder, **options)
    return list(scores.margins.values())[-1]


def difference(table: pa.Table) -> np.ndarray:
    return table["reward_0"].to_numpy() - table["reward_1"].to_numpy()


def bright(pairs: Any) -> np.ndarray:
    """Where the first image is the brighter one, as the servers see it."""
    rows = pq.read_table(pairs.origin.source).to_pylist()
    swapped = dict(
        zip(pairs.table["row"].to_pylist(), pairs.table["swapped"].to_pylist(), strict=True)
    )
    ahead = {i: opened(row["jpg_0"]) - opened(row["jpg_1"]) for i, row in enumerate(rows)}
    return np.array([-ahead[i] if swapped[i] else ahead[i] for i in pairs.table["row"].to_pylist()])


def opened(data: bytes) -> float:
    return brightness(Image.open(io.BytesIO(data)))


def opened_url(url: str) -> float:
    return opened(base64.b64decode(url.partition(",")[2]))


def test_every_server_and_format_prefers_the_brighter_image(pairs: Any, tmp_path: Path) -> None:
    expected = bright(pairs)
    refused = {
        "vllm": set(),
        "llama.cpp": set(),
        "plain": {"response_format", "logprobs"},
        "openai": {"max_tokens", "temperature", "logprobs"},
    }
    cases = [
        ("vllm", "vlm:m", 1 / 20),
        ("vllm", "unifiedreward:m", 1 / 20),
        ("llama.cpp", "vlm-image:m", 3 / 4 * 4 / 255),  # three of four grades
        ("openai", "vlm:m", 0),
        ("openai", "vlm:RationalRewards-8B", 0),
        ("plain", "vlm-image:UnifiedReward-2.0", 4 / 255),
        ("plain", "rationalrewards-image:m", 3 / 255),
        ("plain", "vlm:m", 0),
    ]
    for style, spec, slope in cases:
        vlm = VLM(style)
        with server(vlm) as url:
            table = judged(pairs, f"{spec}@{url}", tmp_path / "scores", compute=ONE)
        found = difference(table)
        assert (np.sign(found) == np.sign(expected)).all(), (style, spec)
        if slope and spec != "vlm:m":
            assert found == pytest.approx(expected * slope, abs=0.02 if slope == 1 / 20 else 1e-4)
        assert set(vlm.refused) <= refused[style], (style, spec)
        assert set(vlm.refused.values()) <= {1}, "what a server refuses is changed once"
        shown = 1 if "image" in spec else 2
        assert all(len(asked) == 1 + shown for asked in vlm.good)
        assert set(vlm.good.values()) == {1}
        assert sum(vlm.good.values()) == 2 * len(pairs)
        facts = score_facts(table)
        assert facts["unanswered"] == 0
        measured = style in ("vllm", "llama.cpp") and spec.endswith(":m") and spec.startswith("vlm")
        assert facts["measured"] == (24 if measured else 0)
        assert facts["tokens"] == 24 * (400 * shown + 40)


def test_images_are_sized_and_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big, small = picture(200, (2000, 1000), "JPEG"), picture(90)
    rows = [("a", big, small, 1.0), ("b", big, small, 0.0), ("c", small, small, 0.5)]
    pairs = fifa.read_pairs(source(tmp_path, rows))
    made: Counter[int] = Counter()
    real = pictures.encoded

    def counted(image: Any, row: int, **how: Any) -> bytes:
        made[row] += 1
        return real(image, row, **how)

    monkeypatch.setattr(pictures, "encoded", counted)
    for compute, sizes in (
        (Compute(), {("JPEG", 768, 384): 4, ("JPEG", 24, 16): 4}),
        (Compute(judge_side=100, judge_images="png"), {("PNG", 100, 50): 4, ("PNG", 24, 16): 4}),
    ):
        made.clear()
        vlm = VLM()
        with server(vlm) as url:
            table = judged(pairs, f"vlm:m@{url}", compute=compute)
        assert vlm.seen == sizes
        assert sorted(made.values()) == [1, 1]
        assert difference(table)[2] == 0  # an image against itself is no question


def test_a_judge_that_always_names_the_first_is_found_out(
    pairs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(VLM(always_first=True)) as url:
        table = judged(pairs, f"vlm:m@{url}", tmp_path)
    assert difference(table) == pytest.approx(0, abs=1e-6)
    assert (table["shown_first"].to_numpy() > 1).all()
    assert (table["shown_second"].to_numpy() < -1).all()
    assert score_facts(table)["orders"] == {"pairs": 12, "turned": 12, "to_first": 12}
    said = capsys.readouterr().err
    assert "in 12 of 12 pairs (100.0%) the winner turned with the order of the images; " in said
    assert "position bias: 12 of these went to the image shown first" in said
    with server(VLM()) as url:
        judged(pairs, f"vlm:m@{url}")
    assert "position bias" not in capsys.readouterr().err


class Flaky(VLM):
    """Fails for good after some answers, until it is mended."""

    most = 10**9

    async def __call__(self, request: Any, body: Any) -> Any:
        if sum(self.good.values()) >= self.most:
            error, soon = {"message": f"out of memory {KEY}"}, {"retry-after-ms": "5"}
            return web.json_response({"error": error}, status=500, headers=soon)
        return await super().__call__(request, body)


def test_a_failing_server_judges_every_pair_once_and_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    pairs = fifa.read_pairs(source(tmp_path, some(40)))
    vlm = Flaky(faults=0.3, seed=3)
    with server(vlm) as url:
        spec, whole, broken = f"vlm:m@{url}", tmp_path / "whole", tmp_path / "broken"
        for _ in range(9):
            table = judged(pairs, spec, whole, compute=Compute(in_flight=8))
            if not score_facts(table)["unanswered"]:
                break
        assert len(vlm.failed) == 9
        assert set(vlm.good.values()) == {1}
        assert sum(vlm.good.values()) == 2 * len(pairs)
        assert (np.sign(difference(table)) == np.sign(bright(pairs))).all()
        vlm.good.clear()
        vlm.faults, vlm.most = 0.0, 21
        with pytest.raises(FifaError, match="keeps failing: HTTP 500: out of memory") as error:
            judged(pairs, spec, broken, compute=Compute(in_flight=2))
        assert KEY not in str(error.value)
        assert not list(broken.glob("margin-*"))
        vlm.most = 10**9
        judged(pairs, spec, broken, compute=Compute(in_flight=8))
        assert set(vlm.good.values()) == {1}
        assert sum(vlm.good.values()) == 2 * len(pairs)
    (one,), (other,) = whole.glob("margin-*"), broken.glob("margin-*")
    assert one.read_bytes() == other.read_bytes()
    vlm.good.clear()
    judged(pairs, spec, whole)  # nobody listens any more, and nobody is asked
    written = b"".join(path.read_bytes() for path in broken.iterdir() if path.is_file())
    assert KEY.encode() not in written


def test_what_cannot_be_read_or_answered_has_no_score_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *some(3),
        ("broken", b"no image", picture(9), 1.0),
        ("refused", picture(1), picture(2), 1.0),
    ]
    pairs = fifa.read_pairs(source(tmp_path, rows))

    class Shy(VLM):
        async def __call__(self, request: Any, body: Any) -> Any:
            if "refused" in body["messages"][0]["content"][-1]["text"]:
                return web.json_response(completion("I would rather not."))
            return await super().__call__(request, body)

    with server(Shy()) as url:
        table = judged(pairs, f"vlm:m@{url}", tmp_path / "s")
        assert np.isnan(difference(table)).tolist() == [False] * 3 + [True] * 2
        (lost,) = (tmp_path / "s").glob("unreadable-*")
        assert read_table(lost)["reason"].to_pylist() == [
            "cannot be decoded: no JPEG, PNG, WEBP, AVIF or HEIC"
        ]
        said = capsys.readouterr().err
        assert "2 of 10 questions about images were not asked: 2 x an image that" in said
        assert "2 of 10 questions about images could not be answered: 2 x no JSON object" in said
        judged(pairs, f"vlm:m@{url}", tmp_path / "s")
        assert "asking again 2 questions" in capsys.readouterr().err
        alone = image_rewards(
            [(unique_images(pairs)[0], pa.array(["a", "b"] * 5))],
            f"vlm:m@{url}",
            tmp_path / "s",
            ONE,
        )[0]
        assert np.isnan(alone).sum() == 1
        assert (alone[~np.isnan(alone)] > 0).all()
        assert load_reward(f"vlm:m@{url}").scale.startswith("log-odds")


def test_a_budget_asks_only_what_the_others_are_unsure_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = some(60)
    table = pq.read_table(source(tmp_path, rows))
    for side in (0, 1):  # a cheaper judge that is sure of the first ones
        sure = [(60 - i) * (row[3] - 0.5) * (1 - 2 * side) for i, row in enumerate(rows)]
        table = table.append_column(f"cheap_{side}", pa.array(sure))
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = fifa.read_pairs(tmp_path / "pairs.parquet")
    cheap = ["column:raw:cheap_0,cheap_1"]
    for budget, most in ((0.25, 15), (30_000, 30_000 // 1680)):
        vlm = VLM()
        with server(vlm) as url:
            found = judged(pairs, [*cheap, f"vlm:m@{url}"], tmp_path / "s", budget=budget)
            facts = score_facts(found)["cascade"]
            assert facts["asked"] == most
            assert sum(vlm.good.values()) == 2 * most
            asked = np.array(found["judged"].to_pylist())
            assert sorted(pairs.table["row"].to_numpy()[asked]) == list(range(60 - most, 60))
            assert np.isfinite(difference(found)).all()
            right = np.sign(difference(found)) == np.sign(bright(pairs))
            assert right[asked].all()
            assert f"asked about {most} of 60 pairs" in capsys.readouterr().err
            again = judged(pairs, [*cheap, f"vlm:m@{url}"], budget=budget, folder=tmp_path / "s")
            assert (difference(again) == difference(found)).all()
            assert sum(vlm.good.values()) == 2 * most
    for margin in (["vlm:m@http://127.0.0.1:9/v1"], cheap):
        with pytest.raises(FifaError, match="a budget takes a vision-language judge and a cheaper"):
            judged(pairs, margin, budget=0.5)
    with pytest.raises(FifaError, match="the judge has no model or no URL: vlm:m@"):
        judged(pairs, "vlm:m@http://:1/v1")


def test_a_run_is_judged_through_batch_files_and_its_report_says_so(tmp_path: Path) -> None:
    out, back = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    spec, run = "vlm:m@http://127.0.0.1:9/v1", tmp_path / "run"  # nothing listens there
    path = source(tmp_path, some(30))
    scores = ("--quality", "none", "--diversity", "none", "--margin", spec)
    score = Score(margin=(spec,), quality="none", diversity="none")
    start_run(run, Recipe(Read(str(path)), score, Select(keep=10)))
    done = commands.fifa("batch", "write", run, out, "--judge")
    assert "60 requests" in done.stderr
    vlm, lines = VLM(always_first=True), []
    for line in out.read_text("utf-8").splitlines():
        request = json.loads(line)
        TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(request["body"])
        body = json.loads(asyncio.run(vlm(None, request["body"])).body)
        result = {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}
        lines.append(json.dumps(result))
    back.write_text("\n".join(lines), "utf-8")
    done = commands.fifa("batch", "read", run, back, "--judge")
    assert "rated=60, missing=0" in done.stderr
    assert commands.fifa("batch", "write", run, out).returncode == 1  # no rater
    done = commands.fifa("filter", path, "--out", run, *scores, "--keep", "10")
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text("utf-8")
    assert "position bias: 30 of these went to the image shown first" in page
