"""Whether a trainer's own loader reads what ``fifa export --to TARGET`` writes.

    python scripts/check_export.py TARGET [CHECKOUT ...]

makes a small export and gives it to the trainer's own code: that of a checkout of its repository
(or, for TRL and webdataset, of the installed package). The captions and the pixels of every winner
and loser must come out as they went in. It needs what that code imports, for which an environment
of its own is best; what needs a GPU or a server is replaced by an empty module and named.

    diffusers    huggingface/diffusers
    flow-factory X-GenGroup/Flow-Factory
    verl-omni    verl-project/verl-omni
    simpletuner  bghira/SimpleTuner
    onetrainer   Nerogar/OneTrainer Nerogar/mgds
    trl          none: the installed trl
    webdataset   huggingface/diffusers, and the installed webdataset
    imagefolder  none: the installed datasets
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fifa
from fifa.scoring.table import Scores
from fifa.selection.trainers import TARGETS

Loaded = Iterator[tuple[str, Any, Any]]  # caption, winner, loser (images, or None where not read)


def make_world(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A few pairs in ``folder``; winner and loser of each prompt, uint8 [height, width, 3]."""
    rng = np.random.default_rng(7)
    rows, wanted = [], {}
    kinds = [("png", "jpg"), ("jpg", "jpg"), ("webp", "png"), ("png", "webp"), ("jpg", "png")]
    shared = _picture(rng, folder / "shared.png")
    for i, (first, second) in enumerate(kinds):
        names = [f"{i}-0.{first}", f"{i}-1.{second}"]
        sides = [_picture(rng, folder / name) for name in names]
        if i < 2:  # an image of two pairs
            names[0], sides[0] = "shared.png", shared
        prompt = f'{i}: "Füchse" | a, b\nline two \u2603 ' + "long " * 300 + "end"
        label = (1.0, 0.0, 0.8, 0.3, 0.0)[i]
        winner = 0 if label > 0.5 else 1
        row = {"prompt": prompt, "image_0": names[0], "image_1": names[1], "label": label}
        rows.append(row)
        wanted[prompt] = (sides[winner], sides[1 - winner])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text, "utf-8")
    return wanted


def _picture(rng: np.random.Generator, path: Path) -> np.ndarray:
    pixels = np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    Image.fromarray(pixels).save(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def empty(*names: str) -> None:
    """Stand-ins for modules that are not needed here."""
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
        print(f"  {name}: an empty module stands in for it")


def function_of(file: Path, name: str, **names: Any) -> Any:
    """A function out of a script that runs when it is imported, with the ``names`` it uses."""
    tree = ast.parse(file.read_text("utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    exec(compile(ast.Module(found[:1], []), str(file), "exec"), names)
    return names[name]


def diffusers(folder: Path, checkout: Path) -> Loaded:
    """`preprocess_train` of its Diffusion-DPO script, on what `datasets` loads."""
    import torch
    from datasets import load_dataset

    loaded = load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    preprocess = function_of(
        checkout / "examples/research_projects/diffusion_dpo/train_diffusion_dpo.py",
        "preprocess_train",
        Image=Image,
        io=io,
        torch=torch,
        tokenizer=None,
        tokenize_captions=lambda tokenizer, examples: examples["caption"],
        train_transforms=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    )
    done = preprocess(loaded[:])
    for caption, both in zip(done["input_ids"], done["pixel_values"], strict=True):
        winner, loser = both.permute(1, 2, 0).split(3, dim=2)
        yield caption, winner.numpy(), loser.numpy()


def webdataset(folder: Path, checkout: Path) -> Loaded:
    """`get_dataset` of diffusers' ORPO script, and the order that its loader puts images in."""
    import webdataset as wds

    script = "examples/research_projects/diffusion_orpo/train_diffusion_orpo_sdxl_lora_wds.py"
    shards = [str(path) for path in sorted((folder / "data").iterdir())]
    args = types.SimpleNamespace(dataset_path=shards)
    samples = function_of(checkout / script, "get_dataset", wds=wds, args=args)(args)
    seen: set[str] = set()
    for sample in samples:  # without an end, shuffled
        if len(seen) == sum(1 for _ in wds.WebDataset(shards, shardshuffle=False)):
            break
        if sample["__key__"] not in seen:
            seen.add(sample["__key__"])
            flip = sample["label_0"] == 0  # `preprocess_images`, on which its labels are text
            sides = [sample["jpg_0"], sample["jpg_1"]]
            yield sample["original_prompt"], *(sides[::-1] if flip else sides)


def imagefolder(folder: Path) -> Loaded:
    """`datasets.load_dataset`, with the builder named and by the card."""
    from datasets import load_dataset

    cache = str(folder.parent / "cache")
    named = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    carded = load_dataset(str(folder), split="train", cache_dir=cache)
    assert [row["caption"] for row in named] == [row["caption"] for row in carded]
    for row in carded:
        sides = [row["jpg_0"], row["jpg_1"]]
        yield row["caption"], *(sides if row["label_0"] == 1 else sides[::-1])


def trl(folder: Path) -> Loaded:
    """`DataCollatorForVisionPreference`, with a processor that keeps what it is given."""
    empty("torchvision._meta_registrations")
    import trl
    from datasets import load_dataset
    from trl.data_utils import is_conversational
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    print(f"  trl {trl.__version__}")
    loaded = load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    assert is_conversational(loaded[0])
    processor = _Processor()
    keep = ("prompt", "chosen", "rejected", "images")
    for row in loaded:
        processor.given.clear()
        DataCollatorForVisionPreference(processor).torch_call([{k: row[k] for k in keep}])
        (prompt, *_), (chosen, *_), (rejected, *_) = (text for text, _ in processor.given)
        images = processor.given[0][1][0]
        answers = [f"Image {n}" in chosen and f"Image {n}" not in rejected for n in (1, 2)]
        assert sum(answers) == 1 and prompt.count("<image>") == 2
        winner = answers.index(True)
        yield prompt.partition("\n\n")[2].rstrip("\n"), images[winner], images[1 - winner]


class _Processor:
    """What the collator asks of a processor, and what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[list[str], Any]] = []

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **kwargs: Any) -> str:
        text = ""
        for message in messages:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            text += "".join("<image>" if p["type"] == "image" else p["text"] for p in parts) + "\n"
        return text

    def __call__(self, text: list[str], images: Any = None, **kwargs: Any) -> dict[str, Any]:
        import torch

        self.given.append((text, images))
        ids = torch.ones(len(text), 4, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids}

    @property
    def tokenizer(self) -> Any:
        return types.SimpleNamespace(pad_token_id=1)


def flow_factory(folder: Path, checkout: Path) -> Loaded:
    """`GeneralDataset`, its preprocessing included."""
    sys.path.insert(0, str(checkout / "src"))
    from flow_factory.data_utils.dataset import GeneralDataset

    (place,) = folder.glob("prompts-*")
    read = GeneralDataset(
        str(place),
        cache_dir=str(folder.parent / "cache"),
        preprocess_func=lambda prompt, images=None: {"given": [str(images)] * len(prompt)},
    )
    for row in read:
        assert row["given"] == "None" and row["metadata"]["pairs"] == 1
        yield row["prompt"], None, None


def verl_omni(folder: Path, checkout: Path) -> Loaded:
    """`OfflineDPODataset` and its expansion; the tensors are ones, which any model's would be."""
    import pandas as pd
    import torch

    empty("verl", "verl.utils", "verl.utils.dataset", "verl.utils.dataset.rl_dataset")
    sys.modules["verl.utils.dataset.rl_dataset"].collate_fn = None  # type: ignore[attr-defined]
    module = types.ModuleType("offline_dpo_dataset")
    file = checkout / "verl_omni/utils/dataset/offline_dpo_dataset.py"
    exec(compile(file.read_text("utf-8"), str(file), "exec"), module.__dict__)
    table = pd.read_parquet(folder / "train.parquet")
    for name in ("img_win_latents", "img_lose_latents", "prompt_embeds", "pooled_prompt_embeds"):
        table[name] = [[1.0]] * len(table)
    table["prompt_embeds_mask"] = [[1]] * len(table)
    table.to_parquet(folder / "train.parquet")

    def tokenizer(text: str, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    tokenizer.pad_token_id = 0  # type: ignore[attr-defined]
    from omegaconf import OmegaConf

    config = OmegaConf.create({"max_prompt_length": 4000})
    read = module.OfflineDPODataset(str(folder / "train.parquet"), tokenizer, config=config)
    for i in range(len(read)):
        win, lose = module.expand_offline_dpo_features([read[i]])
        assert win["is_chosen"] and not lose["is_chosen"]
        assert win["sample_level_scores"] > lose["sample_level_scores"]
        prompt = "".join(chr(c) for c in win["prompts"].tolist() if c)
        assert prompt == win["raw_prompt"]
        yield prompt, Image.open(win["image_path"]), Image.open(lose["image_path"])


def simpletuner(folder: Path, checkout: Path) -> Loaded:
    """Its checks of the configuration, its file listing, captions, pairing and decoder."""
    empty("torchvision._meta_registrations")
    sys.path.insert(0, str(checkout))
    from simpletuner.helpers.data_backend.config import create_backend_config
    from simpletuner.helpers.data_backend.local import LocalDataBackend
    from simpletuner.helpers.metadata.utils.duplicator import DatasetDuplicator
    from simpletuner.helpers.prompts import PromptHandler
    from simpletuner.helpers.training import image_file_extensions

    backends = json.loads((folder / "multidatabackend.json").read_text())
    args = {"resolution": 1024, "resolution_type": "pixel", "model_type": "lora"}
    for backend in backends:
        create_backend_config(backend, args).validate(args)
    win, lose, _ = backends
    assert (win["conditioning_data"], lose["source_dataset_id"]) == ([lose["id"]], win["id"])
    store = LocalDataBackend(types.SimpleNamespace(is_main_process=True), win["id"])
    listed = store.list_files(list(image_file_extensions), win["instance_data_dir"])
    for path in (path for _, _, files in listed for path in files):
        caption = PromptHandler.magic_prompt(
            path,
            use_captions=True,
            caption_strategy=win["caption_strategy"],
            prepend_instance_prompt=False,
            data_backend=store,
            disable_multiline_split=win["disable_multiline_split"],
        )
        other = DatasetDuplicator._translate_conditioning_path(
            path, win["instance_data_dir"], lose["instance_data_dir"], None
        )
        yield caption, store.read_image(path), store.read_image(other)


def onetrainer(folder: Path, checkout: Path, mgds: Path) -> Loaded:
    """Its concepts' class, and the modules of mgds that its data loader begins with."""
    import torch

    empty("torchvision._meta_registrations")
    sys.path[:0] = [str(checkout), str(mgds / "src")]
    from mgds.MGDS import MGDS
    from mgds.OutputPipelineModule import OutputPipelineModule
    from mgds.PipelineModule import PipelineState
    from mgds.pipelineModules.CollectPaths import CollectPaths
    from mgds.pipelineModules.LoadImage import LoadImage
    from mgds.pipelineModules.LoadMultipleTexts import LoadMultipleTexts
    from mgds.pipelineModules.ModifyPath import ModifyPath
    from modules.util import path_util
    from modules.util.config.ConceptConfig import ConceptConfig

    plain = json.loads((folder / "concepts.json").read_text())
    concepts = [ConceptConfig.default_values().from_dict(one).to_dict() for one in plain]
    assert [one["enabled"] for one in concepts] == [True, False]
    endings = path_util.supported_image_extensions()
    definition = [  # as `DataLoaderText2ImageMixin` has them
        CollectPaths(
            concept_in_name="concept",
            path_in_name="path",
            include_subdirectories_in_name="concept.include_subdirectories",
            enabled_in_name="enabled",
            path_out_name="image_path",
            concept_out_name="concept",
            extensions=endings,
            include_postfix=None,
            exclude_postfix=["-masklabel", "-condlabel"],
        ),
        ModifyPath("image_path", "sample_prompt_path", postfix="", extension=".txt"),
        LoadImage("image_path", "image", 0, 1, endings),
        LoadMultipleTexts("sample_prompt_path", "sample_prompts"),
        OutputPipelineModule(names=["image_path", "image", "sample_prompts"]),
    ]
    data = MGDS(torch.device("cpu"), concepts, {}, definition, 1, PipelineState(1))
    data.start_next_epoch()
    for row in data:
        (caption,) = row["sample_prompts"]
        winner = (row["image"] * 255).round().byte().permute(1, 2, 0).numpy()
        lose = folder / "lose" / Path(row["image_path"]).name
        yield caption, winner, Image.open(lose)


def check(name: str, checkouts: list[Path]) -> int:
    """Export, read by the trainer's code, compare; the number of pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        wanted = make_world(world)
        pairs = fifa.read_pairs(world / "pairs.jsonl")
        selection = fifa.select(pairs, Scores(), strategy="random")
        folder = Path(scratch) / "export"
        fifa.export(pairs, selection, Scores(), folder, to=name)
        loader = globals()[name.replace("-", "_")]
        if name == "onetrainer":  # a line is a caption there
            wanted = {" ".join(caption.split()): images for caption, images in wanted.items()}
        found = 0
        for caption, *images in loader(folder, *checkouts):
            for image, pixels in zip(images, wanted.pop(caption), strict=True):
                if image is not None:
                    difference = _pixels(image).astype(int) - pixels
                    assert np.abs(difference).max() <= 3, "other pixels"  # of JPEG decoders
            found += 1
        assert not wanted, f"not read: {list(wanted)}"
    return found


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\ntargets: {', '.join(TARGETS)}")
    count = check(sys.argv[1], [Path(name).resolve() for name in sys.argv[2:]])
    print(f"{sys.argv[1]}: its own code reads {count} pairs, winners, losers and captions alike")
