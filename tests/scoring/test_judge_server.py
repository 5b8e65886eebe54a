"""Vision-language judges against servers of every style: all pairs judged, none twice, no leak."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint_server import VLM, brightness, server
from PIL import Image

import fifa
from fifa.config import Compute
from fifa.scoring.judges import pictures
from fifa.scoring.table import score_facts

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
        a, b = 40 + 7 * (i % 24), 220 - 9 * (i % 20)
        rows.append((f"prompt {i}", picture(a), picture(b), float((a > b) != (i % 5 == 0))))
    return rows


@pytest.fixture
def pairs(tmp_path: Path) -> fifa.Pairs:
    return fifa.read_pairs(source(tmp_path, some(20)))


def judged(pairs: Any, spec: Any, folder: Path | None = None, **options: Any) -> pa.Table:
    options = {"compute": ONE, "quality": "none", "diversity": "none", **options}
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
            table = judged(pairs, f"{spec}@{url}", tmp_path / "scores")
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
        assert facts["measured"] == (40 if measured else 0)
        assert facts["tokens"] == 40 * (400 * shown + 40)


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
    assert score_facts(table)["orders"] == {"pairs": 20, "turned": 20, "to_first": 20}
    said = capsys.readouterr().err
    assert "in 20 of 20 pairs (100.0%) the winner turned with the order; position bias: 20" in said
    with server(VLM()) as url:
        judged(pairs, f"vlm:m@{url}")
    assert "position bias" not in capsys.readouterr().err
