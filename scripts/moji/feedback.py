"""moji-feedback: what is asked for, the pictures moji-sd makes, and simulated choices."""

from __future__ import annotations

import io
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import fifa
from fifa.moji.annotators import ANNOTATORS, utility
from fifa.moji.family import generate
from fifa.moji.world import WORLD, Scene, asked, scenes
from fifa.shards.files import atomic_path, digest, write_table
from moji.annotators import choices, shown
from moji.prompts import FILLERS, NONSENSE, WORDINGS, wording

SEED = 16
TOGETHER = 64  # pictures made at once
LATENT = (4, WORLD.size // 4, WORLD.size // 4)
SCORED = ("clipscore", "proxy")


@dataclass(frozen=True)
class Crowd:
    """What is asked for, and how often.

    Attributes
    ----------
    plain, reworded, verbose, unsafe, nonsense
        Prompts of each kind. Reworded ones say in other words what a plain one asks for.
    pairs
        Pairs in all, without those that several annotators see.
    most
        Pairs of the most popular prompt; the least popular have one.
    tail
        Pairs fall with a prompt's rank to this power.
    keep
        How often the next pair shows the winner again, beside a new picture.
    several
        The share of pairs that three annotators see, not one.
    like
        How often a prompt's next picture is a variation of the one before, as the pictures of
        real pairs often are: a hard choice that says little.
    near
        How far a variation's first noise is from its family's: 0 is the same picture.
    guidance
        The scale that pictures are made with; 1 is what moji-sd learned, its mistakes included.
    steps
        Of the sampler.
    quality
        Of the JPEGs.
    """

    plain: int = 320
    reworded: int = 110
    verbose: int = 90
    unsafe: int = 60
    nonsense: int = 40
    pairs: int = 3300
    most: int = 60
    tail: float = 0.85
    keep: float = 0.6
    several: float = 0.2
    like: float = 0.93
    near: float = 0.2
    guidance: float = 1.0
    steps: int = 15
    quality: int = 95


CROWD = Crowd()


@dataclass(frozen=True)
class Asked:
    """A prompt, its kind, and how many pairs it has."""

    prompt: str
    kind: str
    pairs: int


def write_feedback(pipe: Any, work: Path, feedback: Path, truth: Path) -> None:
    """Make the pictures, let the simulated annotators choose, write both files."""
    rng = np.random.default_rng(SEED)
    wishes = prompts(rng)
    shows = [list(_chain(wish.pairs, rng)) for wish in wishes]
    pictures = _pictures(pipe, wishes, shows, work)
    scene = [asked(prompt) for prompt in pictures.prompt]
    jpegs = [_jpeg(each) for each in pictures.pixels]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in jpegs])
    u, seen = utility(scene, pixels), shown(pixels)
    rows = _rows(wishes, shows, pictures, u, seen.unsafe, rng)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for side in (0, 1):
        columns[f"jpg_{side}"] = [jpegs[i] for i in columns.pop(f"picture_{side}")]
    write_table(feedback, pa.table(columns))
    hidden = {
        "image_uid": pictures.uid,
        "prompt": pictures.prompt,
        "kind": pictures.kind,
        "utility": pa.array(u, pa.float32()),
        "nearest_object": [WORLD.objects[i].name for i in seen.object],
        "nearest_background": [WORLD.backgrounds[j] for j in seen.background],
        "nearest_style": [WORLD.styles[s] for s in seen.style],
        "distance": pa.array(seen.distance, pa.float32()),
        "unsafe": seen.unsafe,
    }
    write_table(truth, pa.table(hidden))


def score_pairs(feedback: Path, clip: Path) -> None:
    """Add score columns, as some public sets have them: ``clipscore_0``, ``proxy_0``, ..."""
    table = pq.read_table(feedback)
    table = table.drop([name for name in table.column_names if name.startswith(SCORED)])
    pairs = fifa.read_pairs(str(feedback))
    margin = (f"clipscore:{clip}", f"proxy@clip:{clip}")
    scores = fifa.score(pairs, margin=margin, quality="none", diversity="none")
    for name, rewards in zip(SCORED, scores.margins.values(), strict=True):
        of_image: dict[str, float] = {}
        for side in (0, 1):
            uids, reward = pairs.table[f"image_{side}"], rewards[f"reward_{side}"]
            of_image |= dict(zip(uids.to_pylist(), reward.to_pylist(), strict=True))
        for side in (0, 1):
            column = [of_image[uid] for uid in table[f"image_{side}_uid"].to_pylist()]
            table = table.append_column(f"{name}_{side}", pa.array(column, pa.float32()))
    write_table(feedback, table)


def prompts(rng: np.random.Generator, crowd: Crowd = CROWD) -> list[Asked]:
    """Every prompt once, in the order of popularity."""
    safe = [s for s in scenes(seen=True) if not s.unsafe]
    bad = [s for s in scenes(seen=True) if s.unsafe]
    plain = [safe[i] for i in rng.permutation(len(safe))[: crowd.plain]]
    texts = [(wording(s, 0), "plain") for s in plain]
    texts += [(text, "reworded") for text in _reworded(plain, crowd.reworded, rng)]
    chosen = [safe[i] for i in rng.permutation(len(safe))[: crowd.verbose]]
    texts += [(_verbose(s, rng), "verbose") for s in chosen]
    both = [(s, n) for s in bad for n in (0, 4)]
    order = rng.permutation(len(both))[: crowd.unsafe]
    texts += [(wording(*both[i]), "unsafe") for i in order]
    made = (_gibberish(rng) for _ in range(crowd.nonsense - len(NONSENSE)))
    texts += [(text, "nonsense") for text in (*NONSENSE, *made)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    counts = _popularity(len(texts), crowd)
    return [Asked(text, kind, n) for (text, kind), n in zip(texts, counts, strict=True)]


def _reworded(plain: list[Scene], count: int, rng: np.random.Generator) -> list[str]:
    """Near-duplicates: another wording, or only other case and punctuation."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        scene = plain[int(rng.integers(len(plain) // 3))]  # some have several
        text = wording(scene, int(rng.integers(1, len(WORDINGS))))
        kind = rng.integers(4)
        if kind == 0:
            text = wording(scene, 0) + "."
        elif kind == 1:
            text = text.capitalize() + "!"
        texts[text] = None
    return list(texts)


def _verbose(scene: Scene, rng: np.random.Generator) -> str:
    extra = rng.permutation(FILLERS)[: int(rng.integers(3, 12))]
    return ", ".join([wording(scene, int(rng.integers(len(WORDINGS)))), *map(str, extra)])


def _gibberish(rng: np.random.Generator) -> str:
    letters = list(string.ascii_lowercase)
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(rng.integers(1, 5))]
    return " ".join(words)


def _popularity(count: int, crowd: Crowd) -> list[int]:
    """Pairs of each prompt: c / rank^tail, at least 1, at most ``most``, adding up to ``pairs``."""
    ranks = np.arange(1, count + 1) ** -crowd.tail
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        total = np.clip(np.rint(middle * ranks), 1, crowd.most).sum()
        low, high = (middle, high) if total < crowd.pairs else (low, middle)
    return [int(n) for n in np.clip(np.rint(high * ranks), 1, crowd.most)]


def _chain(pairs: int, rng: np.random.Generator) -> Iterator[tuple[bool, int]]:
    """For each pair: does it show the last winner again, and how many annotators see it."""
    for i in range(pairs):
        again = i > 0 and rng.random() < CROWD.keep
        yield again, 3 if rng.random() < CROWD.several else 1


@dataclass(frozen=True)
class _Pictures:
    """What was made, prompt by prompt: ``first[i]`` is where prompt i's pictures start."""

    pixels: np.ndarray
    prompt: list[str]
    kind: list[str]
    uid: list[str]
    first: list[int]


def _pictures(
    pipe: Any, wishes: list[Asked], shows: list[list[tuple[bool, int]]], work: Path
) -> _Pictures:
    prompt: list[str] = []
    kind, first, family = [], [], []
    rng = np.random.default_rng([SEED, 1])
    for wish, show in zip(wishes, shows, strict=True):
        first.append(len(prompt))
        count = sum(1 if again else 2 for again, _ in show)
        for i in range(len(prompt), len(prompt) + count):
            alike = i > first[-1] and rng.random() < CROWD.like
            family.append(family[-1] if alike else i)
        prompt += [wish.prompt] * count
        kind += [wish.kind] * count
    uid = [digest(SEED, i, text) for i, text in enumerate(prompt)]
    pixels = np.empty((len(prompt), WORLD.size, WORLD.size, 3), np.uint8)
    for start in range(0, len(prompt), TOGETHER):
        part = range(start, min(start + TOGETHER, len(prompt)))
        path = work / "pictures" / f"{digest(SEED, asdict(CROWD))}-{start}.npy"
        if not path.exists():
            make(pipe, path, [prompt[i] for i in part], [(family[i], i) for i in part])
        pixels[part] = np.load(path)
    return _Pictures(pixels, prompt, kind, uid, first)


def make(pipe: Any, path: Path, prompts: list[str], seeds: list[tuple[int, int]]) -> None:
    """Make some of the pictures, given each one's family and itself, and keep them in ``path``."""
    noise = torch.stack([_noise(*pair) for pair in seeds])
    made = generate(
        pipe, prompts, range(len(prompts)), noise=noise, guidance=CROWD.guidance, steps=CROWD.steps
    )
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        np.save(temporary, made)
    print(f"pictures: {path.stem}", flush=True)


def _noise(family: int, own: int) -> torch.Tensor:
    """sqrt(1 - near^2) of the family's noise and near of a picture's own: normal again."""
    both = [
        torch.randn(LATENT, generator=torch.Generator().manual_seed(2 * seed + side))
        for side, seed in enumerate((family, own))
    ]
    return (1 - CROWD.near**2) ** 0.5 * both[0] + CROWD.near * both[1]


def _rows(
    wishes: list[Asked],
    shows: list[list[tuple[bool, int]]],
    pictures: _Pictures,
    u: np.ndarray,
    unsafe: np.ndarray,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for wish, show, start in zip(wishes, shows, pictures.first, strict=True):
        fresh, winner = start, start
        of_prompt: list[dict[str, Any]] = []
        for again, people in show:
            pair = [winner, fresh] if again else [fresh, fresh + 1]
            fresh += 1 if again else 2
            a, b = (int(i) for i in rng.permutation(pair))
            person = rng.choice(ANNOTATORS.people, people, replace=False)
            ones = np.ones(people, np.int64)
            answers = choices(
                u[a * ones], u[b * ones], unsafe[a * ones], unsafe[b * ones], person, rng
            )
            winner = a if answers.mean() > 0.5 else b
            of_prompt += [
                _row(wish.prompt, a, b, float(x), int(who), pictures)
                for x, who in zip(answers, person, strict=True)
            ]
        rows += [{**row, "num_example_per_prompt": len(of_prompt)} for row in of_prompt]
    return [{**rows[i], "ranking_id": n} for n, i in enumerate(rng.permutation(len(rows)))]


def _row(prompt: str, a: int, b: int, label: float, who: int, all_: _Pictures) -> dict[str, Any]:
    uids = (all_.uid[a], all_.uid[b])
    return {
        "picture_0": a,
        "picture_1": b,
        "caption": prompt,
        "label_0": label,
        "label_1": 1 - label,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": "tie" if label == 0.5 else uids[0 if label == 1 else 1],
        "are_different": label != 0.5,
        "has_label": True,
        "user_id": who,
        "model_0": "moji-sd",
        "model_1": "moji-sd",
    }


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=CROWD.quality, subsampling=0)
    return file.getvalue()
