"""moji-feedback: what is asked for, the pictures moji-sd makes, and simulated choices."""

from __future__ import annotations

import io
import multiprocessing
import string
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image

import fifa
from fifa.console import quiet
from fifa.moji.annotators import ANNOTATORS, utility
from fifa.moji.family import generate, load_sd
from fifa.moji.world import WORLD, Scene, asked, scenes
from fifa.shards.files import atomic_path, digest, files_digest, write_table
from moji.annotators import choices, shown
from moji.prompts import FILLERS, NONSENSE, WORDINGS, wording

SEED = 16
TOGETHER = 64  # pictures made at once
LATENT = (4, WORLD.size // 4, WORLD.size // 4)
SCORED = ("clipscore", "proxy")
Part = tuple[Path, list[str], list[tuple[int, int]]]


@dataclass(frozen=True)
class Crowd:
    """What is asked for, and how often.

    Attributes
    ----------
    seed
        Of everything.
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
    dtype
        What the UNet computes in.
    """

    seed: int = SEED
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
    dtype: str = "float32"


CROWD = Crowd()  # of the feedback that is shipped


def crowd_of(
    pairs: int,
    *,
    nonsense: float | None = None,
    reworded: float | None = None,
    unsafe: float | None = None,
    seed: int = SEED,
) -> Crowd:
    """The shipped feedback's crowd at another size, or with other shares of its prompts' kinds.

    With ten times as many pairs there are root 10 as many prompts, and the most popular one has
    root 10 as many pairs. Kinds keep their shares of the prompts; but plain prompts are at most
    one a scene, so that in a large world more of them are reworded. If ``reworded`` is given,
    there are fewer prompts instead.

    Raises `SystemExit` where the shares leave too few plain prompts to reword.
    """
    grown = (pairs / CROWD.pairs) ** 0.5
    kinds = ("plain", "reworded", "verbose", "unsafe", "nonsense")
    shipped = {kind: getattr(CROWD, kind) for kind in kinds}
    every = sum(shipped.values())
    share = {kind: count / every for kind, count in shipped.items()}
    given = {"nonsense": nonsense, "reworded": reworded, "unsafe": unsafe}
    share |= {kind: value for kind, value in given.items() if value is not None}
    share["plain"] = 1 - sum(share[kind] for kind in kinds[1:])
    room = len(_safe())
    prompts = every * grown
    if share["plain"] * prompts > room and reworded is None:
        share["reworded"] += share["plain"] - room / prompts
        share["plain"] = room / prompts
    prompts = min(prompts, room / max(share["plain"], 1e-9), pairs)
    counts = {kind: round(prompts * value) for kind, value in share.items()}
    if min(counts.values()) < 0 or not counts["reworded"] <= 8 * counts["plain"] > 0:
        raise SystemExit("--nonsense, --reworded and --unsafe leave too few plain prompts")
    most = round(CROWD.most * grown)
    return replace(CROWD, **counts, pairs=pairs, most=most, seed=seed, dtype="bfloat16")


@dataclass(frozen=True)
class Asked:
    """A prompt, its kind, and how many pairs it has."""

    prompt: str
    kind: str
    pairs: int


def write_feedback(
    sd: Path, work: Path, feedback: Path, truth: Path, crowd: Crowd = CROWD, processes: int = 1
) -> None:
    """Make the pictures, let the simulated annotators choose, write both files."""
    rng = np.random.default_rng(crowd.seed)
    wishes = prompts(rng, crowd)
    shows = [list(chain(wish.pairs, rng, crowd)) for wish in wishes]
    pictures = wanted(wishes, shows, crowd)
    drawn = _drawn(sd, pictures, work / "pictures", crowd, processes)
    scene = [asked(prompt) for prompt in pictures.prompt]
    jpegs = [_jpeg(each, crowd.quality) for each in drawn]
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
    safe = _safe()
    bad = [s for s in scenes(seen=True) if s.unsafe]
    plain = [safe[i] for i in rng.permutation(len(safe))[: crowd.plain]]
    texts = [(wording(s, 0), "plain") for s in plain]
    texts += [(text, "reworded") for text in _reworded(plain, crowd.reworded, rng)]
    chosen = [safe[i] for i in rng.permutation(len(safe))[: crowd.verbose]]
    texts += [(_verbose(s, rng), "verbose") for s in chosen]
    both = [(s, n) for s in bad for n in (0, 4)]
    order = rng.permutation(len(both))[: crowd.unsafe]
    texts += [(wording(*both[i]), "unsafe") for i in order]
    texts += [(_verbose(_any(bad, rng), rng), "unsafe") for _ in range(crowd.unsafe - len(both))]
    made = (_gibberish(rng) for _ in range(crowd.nonsense - len(NONSENSE)))
    texts += [(text, "nonsense") for text in (*NONSENSE[: crowd.nonsense], *made)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    counts = _popularity(len(texts), crowd)
    return [Asked(text, kind, n) for (text, kind), n in zip(texts, counts, strict=True)]


def _safe() -> list[Scene]:
    return [s for s in scenes(seen=True) if not s.unsafe]


def _any(some: list[Scene], rng: np.random.Generator) -> Scene:
    return some[int(rng.integers(len(some)))]


def _reworded(plain: list[Scene], count: int, rng: np.random.Generator) -> list[str]:
    """Near-duplicates: another wording, or only other case and punctuation."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        scene = _any(plain[: max(1, len(plain) // 3, count // 4)], rng)  # some have several
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


def chain(pairs: int, rng: np.random.Generator, crowd: Crowd) -> Iterator[tuple[bool, int]]:
    """For each pair: does it show the last winner again, and how many annotators see it."""
    for i in range(pairs):
        again = i > 0 and rng.random() < crowd.keep
        yield again, 3 if rng.random() < crowd.several else 1


@dataclass(frozen=True)
class Pictures:
    """What is to be made, prompt by prompt: ``first[i]`` is where prompt i's pictures start.

    ``family`` is the picture whose noise each one varies, or itself.
    """

    prompt: list[str]
    kind: list[str]
    uid: list[str]
    family: list[int]
    first: list[int]


def wanted(wishes: list[Asked], shows: list[list[tuple[bool, int]]], crowd: Crowd) -> Pictures:
    """The pictures that the pairs of ``shows`` need."""
    prompt: list[str] = []
    kind, first, family = [], [], []
    rng = np.random.default_rng([crowd.seed, 1])
    for wish, show in zip(wishes, shows, strict=True):
        first.append(len(prompt))
        count = sum(1 if again else 2 for again, _ in show)
        for i in range(len(prompt), len(prompt) + count):
            alike = i > first[-1] and rng.random() < crowd.like
            family.append(family[-1] if alike else i)
        prompt += [wish.prompt] * count
        kind += [wish.kind] * count
    uid = [digest(crowd.seed, i, text) for i, text in enumerate(prompt)]
    return Pictures(prompt, kind, uid, family, first)


def _drawn(sd: Path, pictures: Pictures, folder: Path, crowd: Crowd, processes: int) -> np.ndarray:
    """Their pixels; `TOGETHER` of them at a time are kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {str(path.relative_to(sd)): path for path in sorted(sd.rglob("*")) if path.is_file()}
    name = digest(files_digest(files), asdict(crowd))
    paths, left = [], []
    for start in range(0, len(pictures.prompt), TOGETHER):
        some = range(start, min(start + TOGETHER, len(pictures.prompt)))
        paths.append(folder / f"{name}-{start}.npy")
        if not paths[-1].exists():
            seeds = [(pictures.family[i], i) for i in some]
            left.append((paths[-1], [pictures.prompt[i] for i in some], seeds))
    draw = partial(_make, sd, crowd, torch.get_num_threads())
    if processes == 1 or len(left) < processes:
        draw(left)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            list(pool.map(draw, [left[i::processes] for i in range(processes)]))
    return np.concatenate([np.load(path) for path in paths])


def _make(sd: Path, crowd: Crowd, threads: int, parts: list[Part]) -> None:
    """Make pictures, a file a part: prompts, and each picture's family and itself."""
    if not parts:
        return
    torch.set_num_threads(threads)
    with quiet(diffusers, transformers):
        pipe = load_sd(sd)
        _compute_in(pipe.unet, getattr(torch, crowd.dtype))
        for path, prompts, seeds in parts:
            noise = torch.stack([first_noise(*pair, crowd.near) for pair in seeds])
            scale, steps = crowd.guidance, crowd.steps
            some = range(len(prompts))
            made = generate(pipe, prompts, some, noise=noise, guidance=scale, steps=steps)
            with atomic_path(path) as temporary:
                np.save(temporary, made)
            print(f"pictures: {path.stem}", flush=True)


def _compute_in(unet: Any, dtype: torch.dtype) -> None:
    """Let a UNet compute in another dtype, while the sampler goes on in float32."""
    if dtype == torch.float32:
        return
    unet.to(dtype, memory_format=torch.channels_last)

    def cast(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        context = options["encoder_hidden_states"].to(dtype)
        return (arguments[0].to(dtype), *arguments[1:]), options | {
            "encoder_hidden_states": context
        }

    unet.register_forward_pre_hook(cast, with_kwargs=True)
    unet.register_forward_hook(lambda *call: (call[-1][0].float(),))


def first_noise(family: int, own: int, near: float) -> torch.Tensor:
    """sqrt(1 - near^2) of the family's noise and near of a picture's own: normal again."""
    both = [
        torch.randn(LATENT, generator=torch.Generator().manual_seed(2 * seed + side))
        for side, seed in enumerate((family, own))
    ]
    return (1 - near**2) ** 0.5 * both[0] + near * both[1]


def _rows(
    wishes: list[Asked],
    shows: list[list[tuple[bool, int]]],
    pictures: Pictures,
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


def _row(prompt: str, a: int, b: int, label: float, who: int, all_: Pictures) -> dict[str, Any]:
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


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
