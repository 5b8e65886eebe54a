"""The trainers that the selected pairs are written for: a row of `TARGETS` and a function each.

Every layout was read off the trainer's own loader; docs/export.md names it, and says at which
version ``scripts/check_export.py`` has run it on what is written here.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fifa.config import Vote
from fifa.data.kinds import kind_of
from fifa.errors import FifaError
from fifa.selection.table import SELECTION
from fifa.shards.files import content_digest

Integers = npt.NDArray[np.int64]

SHARD_BYTES = 256 << 20  # of images in a file
GROUP_BYTES = 32 << 20  # of images in a row group: what is in memory at once
GROUP_ROWS = 1024

IMAGES = ("jpg_0", "jpg_1")
FROM_SELECTION = [name for name in SELECTION.names if name not in ("pair_id", "status", "reason")]
COLUMNS = pa.schema(
    [
        ("jpg_0", pa.binary()),  # the original bytes, whatever the image format
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),  # 1: image 0 is the winner; 0: image 1
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("are_different", pa.bool_()),  # Pick-a-Pic's; always true
        ("has_label", pa.bool_()),  # Pick-a-Pic's; always true
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_0_url", pa.string()),  # URL or path in the source, if it names one
        ("image_1_url", pa.string()),
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("label", pa.float32()),  # the people's label, which may lie between 0 and 1
        ("votes", pa.int32()),
        *(SELECTION.field(name) for name in FROM_SELECTION),
    ]
)
METADATA = "metadata.jsonl"  # of an imagefolder
SIDES = (
    ("label_0", "label_1"),
    ("image_0_uid", "image_1_uid"),
    ("image_0_url", "image_1_url"),
    ("model_0", "model_1"),  # where the source has them
)
SIGNS = (("jpg", 0, b"\xff\xd8\xff"), ("png", 0, b"\x89PNG\r\n\x1a\n"), ("webp", 8, b"WEBP"))


@dataclass(frozen=True)
class Chosen:
    """The selected pairs, as a target gets them.

    Parameters
    ----------
    table
        `COLUMNS` without the images, then the names that the source has, [pairs], the most
        important pair first.
    sizes
        int64 [pairs], bytes of both images of each; 0 without images.
    images
        From a row to the bytes of its two images; None where the source has references only.
    place
        Where the folder will be, for files that name paths.
    name
        8 hex characters for all of the above: trainers keep what they have computed by the names
        of folders and files, and other pairs, images or weights must have another.
    """

    table: pa.Table
    sizes: Integers
    images: Callable[[int], tuple[bytes, bytes]] | None
    place: Path
    name: str

    def pairs(self) -> Iterator[tuple[dict[str, Any], tuple[bytes, bytes]]]:
        """Every row of ``table`` as a mapping, with the bytes of image 0 and of image 1."""
        assert self.images is not None
        for start in range(0, len(self.table), GROUP_ROWS):
            for i, row in enumerate(self.table.slice(start, GROUP_ROWS).to_pylist(), start):
                yield row, self.images(i)

    def ranked(self) -> Iterator[tuple[dict[str, Any], tuple[bytes, bytes]]]:
        """`pairs` with the winner as image 0 in every row."""
        for row, images in self.pairs():
            if row["label_0"] == 0.0:
                both = [(mine, other) for pair in SIDES for mine, other in (pair, pair[::-1])]
                sides = {mine: row[other] for mine, other in both if other in row}
                row |= sides | {"label": 1.0 - row["label"]}
                images = images[::-1]
            yield row, images


@dataclass(frozen=True)
class Target:
    """A trainer, or a layout that several read.

    Parameters
    ----------
    write
        Writes the pairs into an empty folder; returns the names of its data files, for the card,
        where `datasets` can load them, and none elsewhere.
    layout
        What it writes, in a few words.
    keeps
        What becomes of weights, margins and soft labels.
    loader
        The code that reads it.
    images
        Whether the images are ``needed``, ``kept`` where the source has them, or ``unused``.
    """

    write: Callable[[Path, Chosen], list[str]]
    layout: str
    keeps: str
    loader: str
    images: Literal["needed", "kept", "unused"] = "needed"


def target(name: str) -> Target:
    """The target called ``name``; `FifaError` if there is none."""
    if name not in TARGETS:
        raise FifaError(f"no such target: {name}", do=f"--to {', '.join(TARGETS)}")
    return TARGETS[name]


def diffusers(folder: Path, chosen: Chosen) -> list[str]:
    """Parquet shards with `COLUMNS` and names; without `IMAGES` where there are none."""
    if chosen.images is None:
        return parquet_shards(folder, chosen, chosen.table.schema, lambda part, cells: part)
    pixels = [COLUMNS.field(name) for name in IMAGES]
    schema = pa.schema([*pixels, *chosen.table.schema])
    return parquet_shards(folder, chosen, schema, partial(_with_images, schema))


def _with_images(schema: pa.Schema, part: pa.Table, cells: list[tuple[bytes, bytes]]) -> pa.Table:
    columns = [pa.array([cell[side] for cell in cells], pa.binary()) for side in (0, 1)]
    return pa.Table.from_arrays([*columns, *part.columns], schema=schema)


def parquet_shards(
    folder: Path,
    chosen: Chosen,
    schema: pa.Schema,
    make: Callable[[pa.Table, list[tuple[bytes, bytes]]], pa.Table],
) -> list[str]:
    """Write ``data/train-00000-of-0000N-<digest>.parquet`` and so on, in the pairs' order.

    The digest of its content is in a file's name, as `datasets` caches what it reads by name.
    ``make`` turns rows of the table and the bytes of their images into rows of ``schema``.
    Returns the files' names below the folder.
    """
    (folder / "data").mkdir()
    shards, files = plan_shards(chosen.sizes), []
    for number, groups in enumerate(shards):
        name = f"train-{number:05d}-of-{len(shards):05d}"
        with pq.ParquetWriter(folder / "data" / name, schema, **_settings(schema)) as writer:
            for start, end in groups:
                part = chosen.table.slice(start, end - start)
                cells = [chosen.images(i) for i in range(start, end)] if chosen.images else []
                writer.write_table(make(part, cells), row_group_size=GROUP_ROWS)
        files.append(_named(folder, name, "parquet"))
    return files


def plan_shards(sizes: Sequence[int] | Integers) -> list[list[tuple[int, int]]]:
    """Cut rows of given sizes in bytes into shards of row groups, ``(start, end)`` each."""
    shards: list[list[tuple[int, int]]] = [[]]
    start = group = shard = 0
    for row, size in enumerate(int(size) for size in sizes):
        full = row - start >= GROUP_ROWS or group + size > GROUP_BYTES
        if row > start and full:
            shards[-1].append((start, row))
            shard += group
            start, group = row, 0
            if shard + size > SHARD_BYTES:
                shards.append([])
                shard = 0
        group += size
    shards[-1].append((start, len(sizes)))
    return shards


def _named(folder: Path, name: str, suffix: str) -> str:
    path = folder / "data" / name
    path = path.rename(path.with_name(f"{name}-{content_digest(path)[:16]}.{suffix}"))
    return f"data/{path.name}"


def _settings(schema: pa.Schema) -> dict[str, object]:
    """Images are compressed already, and no two of them are equal."""
    empty = io.BytesIO()
    pq.write_metadata(schema, empty)
    columns = pq.ParquetFile(empty).schema
    leaves = [columns.column(i).path for i in range(len(columns))]
    images = {*IMAGES, "images.list.element.bytes"}.intersection(leaves)
    others = [name for name in leaves if name not in images]
    return {
        "compression": dict.fromkeys(others, "zstd") | dict.fromkeys(images, "none"),
        "use_dictionary": others,
        "write_statistics": others,
    }


def webdataset(folder: Path, chosen: Chosen) -> list[str]:
    """Tar shards, a sample a pair: KEY.jpg_0.jpg, KEY.jpg_1.jpg, the labels, prompt and KEY.json.

    The winner is always image 0: diffusers' script leaves the labels as text, which is never
    equal to 0, and so takes image 0 for the winner whatever they say. The images' names end in
    ``.jpg`` whatever they are, as that script asks for these names; all readers look at the bytes.
    """
    (folder / "data").mkdir()
    shards, files, ranked = plan_shards(chosen.sizes), [], chosen.ranked()
    for number, groups in enumerate(shards):
        name = f"train-{number:05d}-of-{len(shards):05d}"
        with tarfile.open(folder / "data" / name, "w", format=tarfile.PAX_FORMAT) as archive:
            for _ in range(groups[0][0], groups[-1][1]):
                row, images = next(ranked)
                members = {"jpg_0.jpg": images[0], "jpg_1.jpg": images[1]}
                members |= {f"{name}.txt": b"%d" % row.pop(name) for name in ("label_0", "label_1")}
                members["original_prompt.txt"] = row.pop("caption").encode()
                members["json"] = json.dumps(row, ensure_ascii=False).encode()
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{row['pair_id']}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        files.append(_named(folder, name, "tar"))
    return files


def imagefolder(folder: Path, chosen: Chosen) -> list[str]:
    """Images, each once, beside a ``metadata.jsonl``; `datasets` makes jpg_0 and jpg_1 of them."""
    place = folder / f"train-{chosen.name}"
    place.mkdir()
    with (place / METADATA).open("w", encoding="utf-8") as lines:
        for row, images in chosen.pairs():
            names = [_write_image(place, data, row["pair_id"]) for data in images]
            files = {f"{IMAGES[side]}_file_name": names[side] for side in (0, 1)}
            lines.write(json.dumps(files | row, ensure_ascii=False) + "\n")
    return [f"{place.name}/{METADATA}"]


def trl(folder: Path, chosen: Chosen) -> list[str]:
    """Parquet shards in TRL's conversational vision preference format.

    `trl.DPOTrainer` trains models that read images and write text: the prompt shows both images
    and asks which one is better, the chosen answer names the winner and the rejected one the
    loser. The other columns of the subset are beside them; the trainer leaves them out.
    """
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    own = {"prompt": message, "images": pa.list_(image), "chosen": message, "rejected": message}
    kinds = {field.name: field.type for field in chosen.table.schema}
    text = _value(pa.string())
    told: dict[str, Any] = {key: [{"role": text, "content": text}] for key in own}
    told |= {"images": [{"_type": "Image"}]} | {key: _value(kind) for key, kind in kinds.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": told}})}
    schema = pa.schema((own | kinds).items(), metadata=metadata)

    def make(part: pa.Table, cells: list[tuple[bytes, bytes]]) -> pa.Table:
        rows = []
        for row, images in zip(part.to_pylist(), cells, strict=True):
            winner = 0 if row["label_0"] == 1.0 else 1
            own = {
                "prompt": _message("user", f"{Vote().question}\n\n{row['caption']}"),
                "images": [{"bytes": data, "path": None} for data in images],
                "chosen": _message("assistant", f"Image {winner + 1}"),
                "rejected": _message("assistant", f"Image {2 - winner}"),
            }
            rows.append(own | row)
        return pa.Table.from_pylist(rows, schema=schema)

    return parquet_shards(folder, chosen, schema, make)


def _value(kind: pa.DataType) -> dict[str, str]:
    """A column of values as `datasets` names it."""
    names = {"double": "float64", "float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def verl_omni(folder: Path, chosen: Chosen) -> list[str]:
    """``train.parquet`` with paths into ``images/``, each image once.

    Its trainer also needs the latents and text embeddings of its own model in this file;
    ``scripts/encode_verl_omni.py`` adds them, by the trainer's own functions.
    """
    (folder / "images").mkdir()
    rows = []
    for row, images in chosen.ranked():
        names = [_write_image(folder / "images", data, row["pair_id"]) for data in images]
        rows.append(
            {
                "data_source": "fifa",
                "uid": row["pair_id"],
                "prompt": row["caption"],
                "negative_prompt": " ",
                "img_win": f"images/{names[0]}",
                "img_lose": f"images/{names[1]}",
                "win_score": row["label"],
                "lose_score": 1.0 - row["label"],
                "reward_model": {"style": "model", "ground_truth": row["caption"]},
                "extra_info": {"raw_prompt": row["caption"], "raw_negative_prompt": " ", **row},
            }
        )
    facts = pa.struct(
        [("raw_prompt", pa.string()), ("raw_negative_prompt", pa.string()), *chosen.table.schema]
    )
    schema = pa.Table.from_pylist(rows[:1]).schema
    schema = schema.set(schema.get_field_index("extra_info"), pa.field("extra_info", facts))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "train.parquet")
    return []


def simpletuner(folder: Path, chosen: Chosen) -> list[str]:
    """``win/`` and ``lose/`` with the same names, captions, and ``multidatabackend.json``."""
    _two_folders(folder, chosen, lambda caption: caption)
    # the ids too: SimpleTuner keeps latents by them
    win, lose = f"fifa-win-{chosen.name}", f"fifa-lose-{chosen.name}"

    def images(name: str, side: str, **more: Any) -> dict[str, Any]:
        place = {
            "instance_data_dir": str(chosen.place / side),
            "cache_dir_vae": f"cache/vae/{name}",
        }
        return {"id": name, "type": "local", **place, "metadata_backend": "discovery", **more}

    captions = {"caption_strategy": "textfile", "disable_multiline_split": True}
    strict = {"conditioning_type": "reference_strict", "source_dataset_id": win}
    backends = [
        images(win, "win", dataset_type="image", conditioning_data=[lose], **captions),
        images(lose, "lose", dataset_type="conditioning", **strict),
        {
            "id": f"fifa-text-{chosen.name}",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": f"cache/text/fifa-{chosen.name}",
        },
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(backends, indent=2) + "\n")
    return []


def onetrainer(folder: Path, chosen: Chosen) -> list[str]:
    """``win/`` and ``lose/`` with captions, and ``concepts.json``, where the losers are disabled.

    OneTrainer has no preference loss: it can be tuned on the winners. A line of a caption's file
    is a caption of its own there, so that line breaks within a prompt become spaces.
    """
    _two_folders(folder, chosen, lambda caption: " ".join(caption.split()))
    concepts = [
        {"name": f"fifa {name}", "path": str(chosen.place / name), "enabled": enabled}
        for name, enabled in (("win", True), ("lose", False))
    ]
    (folder / "concepts.json").write_text(json.dumps(concepts, indent=2) + "\n")
    return []


def _two_folders(folder: Path, chosen: Chosen, caption: Callable[[str], str]) -> None:
    """PAIR.png in ``win`` and in ``lose``, named as the winner is, and PAIR.txt in both."""
    (folder / "win").mkdir()
    (folder / "lose").mkdir()
    for row, images in chosen.ranked():
        name = row["pair_id"]
        ending, _ = (image_ending(data, name) for data in images)
        for side, data in zip(("win", "lose"), images, strict=True):
            (folder / side / f"{name}.{ending}").write_bytes(data)
            (folder / side / f"{name}.txt").write_bytes(caption(row["caption"]).encode())


def flow_factory(folder: Path, chosen: Chosen) -> list[str]:
    """``prompts-<name>/train.jsonl``: every prompt once, with the facts of its best pair.

    Flow-Factory draws the images itself and judges them by a reward; those in a data set are
    conditions for a model that edits images, so none are written here.
    """
    place = folder / f"prompts-{chosen.name}"  # its cache goes by this name
    place.mkdir()
    names = ("prompt_id", "pair_id", "importance", "quality", "diversity", "weight")
    best: dict[str, dict[str, Any]] = {}
    for row in chosen.table.to_pylist():
        facts = {name: row[name] for name in names}
        first = best.setdefault(row["prompt_id"], {"prompt": row["caption"], **facts, "pairs": 0})
        first["pairs"] += 1
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in best.values())
    (place / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return []


def image_ending(data: bytes, pair: str) -> str:
    """``jpg``, ``png``, ``webp`` or ``avif``, by the bytes of an image of ``pair``.

    Raises `FifaError` for others: the trainers look for files by their names, and would leave out a
    HEIC in silence.
    """
    if kind_of(data) == "AVIF":
        return "avif"
    for ending, at, sign in SIGNS:
        if data.startswith(sign, at):
            return ending
    raise FifaError(
        "an image is neither JPEG, PNG, WEBP nor AVIF, and the trainer opens no others",
        where=f"pair {pair}",
        do="convert the source's images, or export with --to diffusers, which keeps all bytes",
    )


def _write_image(folder: Path, data: bytes, pair: str) -> str:
    """Write an image under the digest of its bytes, unless it is there already; its name."""
    name = f"{xxhash.xxh3_128_hexdigest(data)}.{image_ending(data, pair)}"
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


_ALL = "weights, margins and soft labels are kept as columns"
_NONE = "it has no place for weights, margins or soft labels: they are left out"

# A target is a row here; ``fifa export --to`` takes these names.
TARGETS = {
    "diffusers": Target(
        diffusers,
        "Parquet files with the columns jpg_0, jpg_1, label_0, label_1 and caption",
        f"{_ALL}; of the trainers that read it, `fifa train` uses them",
        "huggingface/diffusers examples/research_projects/diffusion_dpo, "
        "SalesforceAIResearch/DiffusionDPO",
        images="kept",
    ),
    "flow-factory": Target(
        flow_factory,
        "train.jsonl with every prompt once: Flow-Factory makes and judges the images itself",
        "weight, importance, quality and diversity of a prompt's best pair are metadata of its "
        "prompt; winners, margins and soft labels have no place in online training and are left "
        "out",
        "X-GenGroup/Flow-Factory src/flow_factory/data_utils/dataset.py",
        images="unused",
    ),
    "verl-omni": Target(
        verl_omni,
        "train.parquet with img_win, img_lose and their scores, and images/; the latents and text "
        "embeddings that it needs beside them come from its own model: "
        "scripts/encode_verl_omni.py adds them",
        "the share of people is win_score and lose_score, which the trainer logs and does not "
        "train on; weights and margins are in extra_info, which it does not read",
        "verl-project/verl-omni verl_omni/utils/dataset/offline_dpo_dataset.py",
    ),
    "simpletuner": Target(
        simpletuner,
        "win/ and lose/ with equal file names and captions, and multidatabackend.json for its "
        "Flow-DPO",
        _NONE,
        "bghira/SimpleTuner documentation/experimental/FLOW_DPO.md",
    ),
    "onetrainer": Target(
        onetrainer,
        "win/ and lose/ with captions, and concepts.json; OneTrainer has no preference loss: it is "
        "tuned on the winners, and the losers are a concept that is not enabled",
        _NONE,
        "Nerogar/OneTrainer modules/dataLoader/mixin/DataLoaderText2ImageMixin.py",
    ),
    "trl": Target(
        trl,
        "Parquet files with prompt, images, chosen and rejected: TRL trains a vision-language "
        "model to say which image is better",
        f"{_ALL}, which the trainer does not read",
        "huggingface/trl trl/trainer/dpo_trainer.py, DataCollatorForVisionPreference",
    ),
    "webdataset": Target(
        webdataset,
        "tar files with jpg_0, jpg_1, label_0, label_1 and original_prompt; the winner is always "
        "jpg_0",
        "weights, margins and soft labels are in KEY.json",
        "huggingface/diffusers examples/research_projects/diffusion_orpo/"
        "train_diffusion_orpo_sdxl_lora_wds.py, webdataset",
    ),
    "imagefolder": Target(
        imagefolder,
        "images, each once, with a metadata.jsonl that names them in jpg_0_file_name and "
        "jpg_1_file_name",
        _ALL,
        "huggingface/datasets, the imagefolder builder",
    ),
}
