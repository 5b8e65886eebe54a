"""The models that are compared: where their weights are, how they were trained, what that cost.

A reward model that picked the training pairs is no evidence for the result: it praises its own
taste. So it matters which run selected a checkpoint's pairs, as far as that is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any, Literal

from fifa.config import GENERATE_FILE, RECIPE_FILE, Generate
from fifa.console import LOG_FILE, echo
from fifa.errors import FifaError
from fifa.evaluation.history import number
from fifa.evaluation.stats import Number
from fifa.models.assemble import assembled
from fifa.models.families import PIPELINES
from fifa.models.hub import PART_FILES, fetch_variants, model_folder, pipeline_folder
from fifa.models.joints import check_joints
from fifa.models.lora import LORA_FILE, find_lora
from fifa.scoring.specs import REWARDS
from fifa.shards.files import (
    content_digest,
    digest,
    files_digest,
    read_json,
    read_json_lines,
    read_yaml,
)
from fifa.shards.manifest import check_manifest
from fifa.shards.mirror import local

Method = Literal["base", "lora", "part", "pipeline"]

BASE = "base"
PARTS = ("unet", "transformer")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
CHECKPOINT_FILES = ("*.json", LORA_FILE, *(f"{part}/{name}" for part in PARTS for name in WEIGHTS))
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # no part of making an image
# The run's steps by what they are: every other one is neither
SELECTING = {"read": "reading", "margin": "scoring", "quality": "rating", "diversity": "embedding"}
CHOOSING = ("select", "export")


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Parameters
    ----------
    name
        ``base``, or a checkpoint's name.
    method
        ``base``; ``lora``: weights added to the base; ``part``: a UNet or transformer in the
        base's place; ``pipeline``: all parts of its own.
    source
        What the user named.
    path
        The pipeline's or the part's folder, or the LoRA's file.
    base
        The base's folder.
    base_weights
        What names the base's weights: a LoRA or a part is nothing without them.
    """

    name: str
    method: Method
    source: str
    path: Path
    base: Path
    base_weights: str

    @property
    def pipeline(self) -> Path:
        """The folder that the pipeline is loaded from."""
        return self.path if self.method == "pipeline" else self.base

    @cached_property
    def weights(self) -> str:
        """16 hex characters that name all weights and settings, wherever they lie."""
        if self.method == "base":
            return self.base_weights
        if self.method == "pipeline":
            return files_digest(_pipeline_files(self.path))
        if self.method == "lora":
            return digest(self.base_weights, files_digest({"lora": self.path}))
        files = {file.name: file for file in _model_files(self.path)}
        return digest(self.base_weights, part_name(self.path), files_digest(files))

    @property
    def training(self) -> Path | None:
        """The folder with the checkpoint's ``train.json``, if our trainer made it."""
        if self.method == "base":
            return None
        near = (self.path, *list(self.path.parents)[:4])
        return next((folder for folder in near if (folder / "train.json").is_file()), None)


def find_models(base: str, tuned: Mapping[str, str], asked: Generate | None = None) -> list[Model]:
    """The base and its checkpoints, the base first.

    Parameters
    ----------
    base
        A folder in diffusers' layout, a hub id, or a model's single file.
    tuned
        Checkpoints by name: see `find_checkpoint`.
    asked
        What else belongs into the base: see `fifa.models.assemble.assembled`.

    Raises
    ------
    FifaError
        For a model that is not there, a checkpoint named ``base``, and one that was trained on the
        same base with a LoRA in it, which ``asked`` lacks.
    """
    asked = asked or Generate()
    folder = find_pipeline(str(assembled(base, asked)))
    if BASE in tuned:
        raise FifaError("a checkpoint cannot be named base", do="--tuned NAME=PATH names it")
    whole = files_digest(_pipeline_files(folder))
    first = Model(BASE, "base", base, folder, folder, whole)
    checkpoints = [find_checkpoint(name, path, first) for name, path in tuned.items()]
    for checkpoint in checkpoints:
        _check_pieces(checkpoint, base, asked)
    return [first, *checkpoints]


def _check_pieces(checkpoint: Model, base: str, asked: Generate) -> None:
    """Raise `FifaError` for a checkpoint whose base was this one with another LoRA, or none, in it.

    Another VAE is only told: the weights fit with both. A base of another name may have the pieces
    in it already (`fifa convert`), and is taken.
    """
    folder = checkpoint.training
    if folder is None or checkpoint.method == "pipeline":
        return
    facts = read_json(folder / "train.json", "the training", missing={})
    options = facts.get("options")
    if not isinstance(options, dict) or not _is_same(str(facts.get("base_model")), base):
        return
    lora, vae = options.get("init_lora"), options.get("vae")
    if lora and not asked.init_lora:
        raise FifaError(
            f"{checkpoint.name} was trained on this base with a LoRA in it, {lora}",
            where=str(checkpoint.path),
            do=f"give it here too: --init-lora {lora}",
        )
    if asked.init_lora and facts.get("init_lora") != content_digest(find_lora(asked.init_lora)):
        other = f"with another one, {lora}" if lora else "without one"
        raise FifaError(
            f"{checkpoint.name} was not trained on this base with that LoRA in it, but {other}",
            where=str(checkpoint.path),
            do=f"--init-lora {lora}" if lora else "leave out --init-lora",
        )
    if vae and not asked.vae:
        echo(f"{checkpoint.name} was trained with another VAE: --vae {vae} takes it here too")


def _is_same(one: str, other: str) -> bool:
    """Whether two names are those of one model."""
    paths = [Path(name).expanduser().resolve() for name in (one, other)]
    return one == other or (paths[0] == paths[1] and paths[0].exists())


def name_checkpoints(paths: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH``, or the path alone, named by as much of its end as tells all apart."""
    given = [_named(path) for path in dict.fromkeys(paths)]
    parts = [_parts(path) for name, path in given if not name]
    most = max(map(len, parts), default=1)
    depth = next((d for d in range(1, most) if len({p[-d:] for p in parts}) == len(parts)), most)
    found: dict[str, str] = {}
    for own, path in given:
        name = own or "/".join(_parts(path)[-depth:]) or "tuned"
        if name in found:
            raise FifaError(f"two checkpoints are named {name}", do="--tuned NAME=PATH names them")
        found[name] = path
    return found


def find_pipeline(model: str) -> Path:
    """The folder of a pipeline in diffusers' layout: local as it is, or a hub id's files.

    Raises `FifaError` for one that is not there, that brings code of its own, or whose parts do
    not fit together.
    """
    path = pipeline_folder(model)
    if family := PIPELINES.get(class_name(path)):
        family.check_version()
        if missing := [part for part in family.parts if not (path / part).is_dir()]:
            raise FifaError(
                f"the model lacks its {', '.join(missing)}",
                where=str(path),
                do="name a complete folder in diffusers' layout, or a hub id",
            )
        check_joints(path, family)
    return path


def class_name(folder: Path) -> str:
    """The class of the pipeline in ``folder``."""
    name = _index(folder).get("_class_name")
    if not isinstance(name, str):
        raise FifaError(
            "the pipeline brings code of its own, which is never run",
            where=str(folder / "model_index.json"),
            do="choose one of diffusers' own pipelines",
        )
    return name


def find_checkpoint(name: str, source: str, base: Model) -> Model:
    """A checkpoint, told apart by what is there.

    A whole pipeline (``model_index.json``), a folder with ``unet/`` or ``transformer/`` or one
    of these itself, a LoRA's folder or file, or a hub id with one of these. Of a training of ours
    that measured held-out pairs: what was best on them.

    Raises `FifaError` where none of these is there.
    """

    def found(method: Method, path: Path) -> Model:
        for place in (path, path.parent):
            below = path.relative_to(place).as_posix()
            check_manifest(place, "" if below == "." else below)
        return Model(name, method, source, path, base.base, base.base_weights)

    path = local(source)
    if path.is_file():
        return found("lora", find_lora(source))
    folder = model_folder(source, CHECKPOINT_FILES)
    folder = fetch_variants(source, folder, CHECKPOINT_FILES)
    if (folder / "best").is_dir() and (folder / "train.json").is_file():
        folder = folder / "best"
    if (folder / "model_index.json").is_file():
        return found("pipeline", find_pipeline(source))
    if (folder / LORA_FILE).is_file():
        return found("lora", folder / LORA_FILE)
    for part in (*(folder / part for part in PARTS), folder):
        if (part / "config.json").is_file() and part_name(part):
            family = PIPELINES.get(class_name(base.base))
            if family and part_name(part) == family.part:
                check_joints(base.base, family, part)
            return found("part", part)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return found("lora", loose[0])
    raise FifaError(
        "no checkpoint here",
        where=str(folder),
        do=f"a folder with {LORA_FILE}, unet/, transformer/ or model_index.json, or a LoRA's file",
    )


def part_name(folder: Path) -> str:
    """``unet`` or ``transformer``, by the class in the folder's config; empty for another."""
    settings = read_json(folder / "config.json", "the model's settings", missing={})
    name = settings.get("_class_name", "")
    return "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""


def _named(text: str) -> tuple[str, str]:
    """The name (empty for none) and the path of ``NAME=PATH`` or ``PATH``."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and "/" not in name else ("", text)


def _parts(path: str) -> tuple[str, ...]:
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    while len(parts) > 1 and Path(parts[-1]).name in (*PARTS, LORA_FILE):
        parts.pop()
    return tuple(parts)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.exists():
        raise FifaError(
            "no pipeline in diffusers' layout",
            where=str(path),
            do="name the folder that save_pretrained wrote",
        )
    index: dict[str, Any] = read_json(path, "the pipeline's index")
    return index


def _pipeline_files(folder: Path) -> dict[str, Path]:
    """The files of the parts that make an image."""
    parts = [name for name in _index(folder) if name[0] != "_" and name not in UNUSED]
    files = [folder / "model_index.json"]
    files += [file for part in parts for file in _model_files(folder / part)]
    return {file.relative_to(folder).as_posix(): file for file in files}


def _model_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.suffix in PART_FILES]


@dataclass(frozen=True)
class Training:
    """What the files beside a checkpoint say; all empty where another program trained it.

    Parameters
    ----------
    facts
        Its ``train.json``.
    lines
        Of its ``stats.jsonl``.
    log
        Seconds and tokens by step of the run that selected its pairs.
    scorers
        The specs of the reward models that picked its pairs.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    lines: Sequence[dict[str, Any]] = ()
    log: dict[str, dict[str, float]] = field(default_factory=dict)
    scorers: tuple[str, ...] = ()


def read_training(model: Model) -> Training:
    """The training of a checkpoint.

    ``train.json`` and, beside the pairs that it was trained on, ``subset.json``,
    ``recipe.yaml`` or ``generate.yaml`` say which reward models picked them, as far as that is
    known.
    """
    folder = model.training
    if folder is None:
        return Training()
    for name in ("train.json", "train.yaml", "stats.jsonl"):
        check_manifest(folder, name)
    facts = read_json(folder / "train.json", "the training", missing={})
    scorers = _margins(facts)
    places = _places(read_yaml(folder / "train.yaml", "the training", missing={}))
    for place in places:
        subset = read_json(place / "subset.json", "the subset", missing={})
        scorers += [*run_scorers(place), *_margins(subset)]
        scorers += [*_judges(places), *_judges(_places(subset.get("source")))]
    log = next((place / LOG_FILE for place in places if (place / LOG_FILE).is_file()), None)
    lines = read_json_lines(folder / "stats.jsonl")[0]
    return Training(facts, lines, _log(log) if log else {}, tuple(dict.fromkeys(scorers)))


def run_scorers(run: Path) -> list[str]:
    """The specs of the reward models in a run folder's recipe; none without a recipe.

    Those that judged the pairs which it reads are among them, where these were generated.
    """
    ours = (run / "run.json").is_file()
    recipe = read_yaml(run / RECIPE_FILE, "the recipe", missing={}, sealed=ours)
    return [*_margins(recipe), *_judges(_places(recipe.get("read")))]


def _judges(places: Iterable[Path]) -> list[str]:
    """The specs of the reward models that judged generated pairs in one of some folders."""
    options = (read_yaml(place / GENERATE_FILE, "the options", missing={}) for place in places)
    return [spec for found in options for spec in _margins(found)]


def _places(facts: Any) -> tuple[Path, ...]:
    """The local ``source`` in some facts, and the folder that it is in."""
    source = facts.get("source") if isinstance(facts, dict) else None
    if not isinstance(source, str) or not source or "://" in source:
        return ()
    return Path(source), Path(source).parent


def is_picked(spec: str, picked: Sequence[str]) -> bool:
    """Whether a scorer, or a close relative of it, is among those that picked the data.

    ``pickscore`` is the same model as ``pickscore:FOLDER`` and as the columns
    ``column:pickscore_prob_0,pickscore_prob_1``; hpsv2 and hpsv2.1 are relatives, and so
    are hpsv3 and hpsv3++; one proxy is as good as another, for all learn from the same feedback.
    """
    family = _family(spec)
    return any(spec == other or _is_relative(family, other) for other in picked)


def _log(path: Path) -> dict[str, dict[str, float]]:
    """Seconds and tokens by step; a step that ran twice counts twice: it was paid for."""
    found: dict[str, dict[str, float]] = {}
    for line in read_json_lines(path, sealed=True)[0]:
        name, seconds = line.get("step"), number(line.get("seconds"))
        if not isinstance(name, str) or isnan(seconds):
            continue
        entry = found.setdefault(name, {"seconds": 0.0, "tokens": 0.0})
        entry["seconds"] += seconds
        tokens = (number(line.get(key)) for key in ("tokens_in", "tokens_out"))
        entry["tokens"] += sum(count for count in tokens if not isnan(count))
    return found


def _family(spec: str) -> str:
    entry = REWARDS.parse(spec).entry
    return entry.family or entry.name


def _is_relative(family: str, picked: str) -> bool:
    """Whether what picked the data is of the family, or a source's columns called like it."""
    try:
        parsed = REWARDS.parse(picked.lower())
    except FifaError:  # a scorer of another version of FiFA
        return False
    if not parsed.is_column:
        return _family(parsed.text) == family
    return family != "proxy" and family in re.sub(r"[^a-z0-9]", "", parsed.model)


def _margins(facts: Any) -> list[str]:
    """Every ``margin`` list of specs in some facts, however deep."""
    if isinstance(facts, dict):
        own = facts.get("margin")
        if isinstance(own, dict):
            own = list(own)
        found = [spec for spec in own if isinstance(spec, str)] if isinstance(own, list) else []
        return found + [s for key, part in facts.items() if key != "margin" for s in _margins(part)]
    return [spec for part in facts for spec in _margins(part)] if isinstance(facts, list) else []


@dataclass(frozen=True)
class Cost:
    """What one checkpoint cost, in seconds unless another unit is named; NaN where unknown.

    Parameters
    ----------
    model
        Its name.
    reading, scoring, rating, embedding, choosing
        Of the run that selected its pairs.
    training
        Wall time.
    hours
        Accelerator hours of training: processes times wall time.
    steps, pairs
        Of training; pairs are counted each time they are seen.
    tokens
        Read and written by the rater.
    """

    model: str
    reading: Number
    scoring: Number
    rating: Number
    embedding: Number
    choosing: Number
    training: Number
    hours: Number
    steps: Number
    pairs: Number
    tokens: Number

    @property
    def selecting(self) -> float:
        """Seconds from the source to the subset; 0 where no run selected the pairs."""
        parts = (self.reading, self.scoring, self.rating, self.embedding, self.choosing)
        return sum(part for part in parts if part == part)

    @property
    def rest(self) -> float:
        """Seconds of selecting beside scoring and rating; NaN where nothing is known."""
        parts = (self.reading, self.embedding, self.choosing)
        found = [part for part in parts if part == part]
        return sum(found) if found else float("nan")

    @property
    def total(self) -> float:
        """Seconds from the source to the weights; NaN where the training's are not known."""
        return self.selecting + self.training


def cost_of(name: str, training: Training) -> Cost:
    """What the checkpoint ``name`` cost."""
    facts, log = training.facts, training.log

    def seconds(steps: Iterable[str]) -> float:
        found = [log[step]["seconds"] for step in steps if step in log]
        return float(sum(found)) if found else float("nan")

    return Cost(
        model=name,
        **{field: seconds([step]) for step, field in SELECTING.items()},
        choosing=seconds(CHOOSING),
        training=number(facts.get("seconds")),
        hours=number(facts.get("accelerator_hours")),
        steps=number(facts.get("steps")),
        pairs=number(facts.get("pairs_seen")),
        tokens=float(sum(entry["tokens"] for entry in log.values())),
    )
