"""How many images are made together: found, remembered, and fewer once memory has run out."""

import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from checkpoints import SMALL, write_model
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from fifa.config import Evaluate, Generate
from fifa.errors import FifaError
from fifa.evaluation import batches, sampling
from fifa.evaluation import generate as generation
from fifa.evaluation.batches import FILE, find_batch, halved, keep_batches, kept_batches
from fifa.evaluation.generate import generate, plan
from fifa.evaluation.models import find_models
from fifa.evaluation.prompts import Prompts, read_prompts
from fifa.evaluation.sampling import PipelineLoader, make_images, settings_for
from fifa.shards.sealed import SEAL


def make(base, folder, *, tuned=(), count=7, seeds=2, batch=None, device="cuda"):
    """The images of a card that is imitated: everything runs on the CPU."""
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat number {i}\n" for i in range(count)))
    asked = Evaluate(seeds=seeds, generate=Generate(**SMALL, batch=batch, device="cpu"))
    models = find_models(str(base), {str(i): str(path) for i, path in enumerate(tuned)})
    settings = replace(settings_for(asked.generate, base), device=device)
    return generate(asked, models, read_prompts(prompts), settings, folder)


def groups(table, model="base"):
    """How many images each group has, in order."""
    names = [row["file"] for row in table.to_pylist() if row["model"] == model]
    return list(Counter(name.rpartition("-")[2] for name in names).values())


def kept(folder):
    """What is remembered, but for the file's digest of itself."""
    return [value for key, value in json.loads((folder / FILE).read_text()).items() if key != SEAL]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def room_for(monkeypatch, most, spare=10**9):
    """A device on which no more than ``most`` images fit, after the first ``spare`` groups."""
    made, real = [], generation.make_images

    def limited(pipe, settings, prompts, seeds):
        made.append(len(prompts))
        if len(prompts) > most and len(made) > spare:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pipe, settings, prompts, seeds)

    monkeypatch.setattr(generation, "make_images", limited)
    return made


@pytest.fixture
def finds_six(monkeypatch):
    def six(attempt, sizes, device):
        attempt(2)
        return min(sizes[-1], 6)

    monkeypatch.setattr(batches, "largest_batch", six)


def test_a_found_batch_is_remembered_and_used_again(
    base, lora, tmp_path, monkeypatch, finds_six, capsys
):
    table = make(base, tmp_path, tuned=[lora])
    assert groups(table) == groups(table, "0") == [6, 6, 2]
    assert kept(tmp_path) == [[[0, 6]]]
    assert "6 images are made together, in tf32 on cuda" in capsys.readouterr().err
    there = contents(tmp_path)

    monkeypatch.setattr(generation, "find_batch", lambda *a: pytest.fail("it is known"))
    assert make(base, tmp_path, tuned=[lora]).equals(table)
    assert contents(tmp_path) == there
    next(tmp_path.rglob("*.png")).unlink()  # killed on the way
    make(base, tmp_path, tuned=[lora])
    assert contents(tmp_path) == there
    more = make(base, tmp_path, count=9)
    assert groups(more) == [6, 6, 6]
    assert more["file"].to_pylist()[:12] == table["file"].to_pylist()[:12]


def test_it_is_kept_before_the_first_image_is_made(base, tmp_path, monkeypatch, finds_six):
    def killed(*arguments):
        assert (tmp_path / FILE).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "make_images", killed)
    with pytest.raises(KeyboardInterrupt):
        make(base, tmp_path)


def test_nothing_is_tried_on_a_processor_or_for_a_few_images(base, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "find_batch", lambda *a: pytest.fail("there is no need"))
    assert groups(make(base, tmp_path / "cpu", device="cpu")) == [4, 4, 4, 2]
    assert groups(make(base, tmp_path / "few", count=2)) == [4]
    assert groups(make(base, tmp_path / "given", batch=2, count=3)) == [2, 2, 2]
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.parametrize("batch", [None, 6])
def test_out_of_memory_halves_the_plannedof_all_models_from_there_on(
    base, lora, tmp_path, monkeypatch, finds_six, capsys, batch
):
    made = room_for(monkeypatch, 4, spare=2)
    table = make(base, tmp_path / "broken", tuned=[lora], batch=batch)
    # 6 twice, the third group is small, then the LoRA's first does not fit, tried twice
    assert made[:5] == [6, 6, 2, 6, 6]
    assert groups(table) == groups(table, "0") == [2] * 7
    assert "3 from here on, of all models" in capsys.readouterr().err
    assert kept(tmp_path / "broken") == [[[0, 3]]]
    for file in table["file"].to_pylist():
        assert (tmp_path / "broken" / file).exists()
    # on a device with more memory, what was settled stays
    monkeypatch.undo()
    monkeypatch.setattr(generation, "make_images", lambda *a: pytest.fail("all is there"))
    assert make(base, tmp_path / "broken", tuned=[lora], batch=batch).equals(table)


def test_plannedbefore_the_one_that_did_not_fit_stay(base, tmp_path, monkeypatch):
    made = room_for(monkeypatch, 4, spare=1)
    table = make(base, tmp_path / "run", batch=6)
    assert made == [6, 6, 6, 2, 2, 2, 2]
    assert groups(table) == [6, 2, 2, 2, 2]
    monkeypatch.undo()
    prompts = table["prompt"].to_pylist()
    seeds = table["seed"].to_pylist()
    loader = loader_of(base)
    with loader.use(find_models(str(base), {})[0]) as pipe:
        settings = settings_of(base)
        for part in (slice(0, 6), slice(6, 8)):
            expected = make_images(pipe, settings, prompts[part], seeds[part])
            found = [
                np.asarray(Image.open(tmp_path / "run" / f))
                for f in table["file"][part].to_pylist()
            ]
            np.testing.assert_array_equal(np.stack(found), expected)


def settings_of(base, **more):
    return settings_for(Generate(**SMALL, device="cpu", **more), base)


def loader_of(base, device="cpu"):
    return PipelineLoader(base, replace(settings_of(base), device=device), "cpu")


def test_memory_that_ran_out_once_may_only_have_been_in_pieces(base, tmp_path, monkeypatch):
    real, calls = generation.make_images, []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(generation, "make_images", once)
    assert groups(make(base, tmp_path, batch=4)) == [4, 4, 4, 2]
    assert len(calls) == 5


def test_what_is_not_about_memory_is_raised(base, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(generation, "make_images", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        make(base, tmp_path, batch=4)


def test_no_room_for_a_single_image_is_told(base, tmp_path, monkeypatch):
    room_for(monkeypatch, 0, spare=0)
    with pytest.raises(FifaError, match="out of memory with a single image"):
        make(base, tmp_path, count=1, batch=2)
    monkeypatch.setattr(batches, "make_images", generation.make_images)
    with pytest.raises(FifaError, match="out of memory with a single image"):
        make(base, tmp_path / "found")


def test_batches_from_a_row_on():
    assert halved(((0, 16),), 64, 16) == ((0, 16), (64, 8))
    assert halved(((0, 16), (64, 8)), 96, 8) == ((0, 16), (64, 8), (96, 4))
    assert halved(((0, 16), (64, 8)), 32, 16) == ((0, 16), (32, 8))
    assert halved(((0, 16),), 0, 16) == ((0, 8),)
    with pytest.raises(FifaError, match="single image"):
        halved(((0, 1),), 5, 1)


@examples(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 12), st.integers(1, 6))
def test_a_plan_has_every_image_once_in_plannedthat_do_not_cross_a_change(base, data, count, seeds):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    starts = data.draw(st.lists(st.integers(1, 80), min_size=3, max_size=3, unique=True))
    changes = tuple(zip([0, *sorted(starts)], sizes, strict=False))
    names = [f"a cat number {i}" for i in range(count)]
    table = pa.table({"prompt_id": names, "prompt": names, "category": [None] * count})
    planned = plan(
        find_models(str(base), {})[0],
        Prompts("", table, count, {}),
        settings_of(base),
        Evaluate(seeds=seeds),
        changes,
    )
    assert [image.row for group in planned for image in group] == list(range(count * seeds))
    for group in planned:
        first, last = group[0].row, group[-1].row
        size = [size for start, size in changes if start <= first][-1]
        assert len(group) <= size
        assert not any(first < start <= last for start, _ in changes)
        if first == 0 and seeds <= size and len(changes) == 1:
            assert len(group) % seeds == 0  # whole prompts


def test_settings_of_other_models_are_kept_beside_each_other(tmp_path):
    assert kept_batches(tmp_path, "a") is None
    keep_batches(tmp_path, "a", ((0, 16), (64, 8)))
    keep_batches(tmp_path, "b", ((0, 4),))
    assert kept_batches(tmp_path, "a") == ((0, 16), (64, 8))
    assert kept_batches(tmp_path, "b") == ((0, 4),)


def test_a_batch_is_tried_at_the_real_size_in_few_steps(base, monkeypatch):
    tried = []

    def pictures(pipe, settings, prompts, seeds):
        tried.append((len(prompts), settings.steps, settings.guidance))
        return np.zeros((len(prompts), 1024, 1024, 3), np.uint8)

    def doubling(attempt, sizes, device):
        for size in (1, 2, 4, 8, 16):
            attempt(min(size, sizes[-1]))
        return sizes[-1]

    monkeypatch.setattr(batches, "make_images", pictures)
    monkeypatch.setattr(batches, "largest_batch", doubling)
    settings = replace(settings_of(base), steps=50)
    with loader_of(base).use(find_models(str(base), {})[0]) as pipe:
        assert find_batch(pipe, settings, "a cat") == 16  # as many pixels as 64 of 512 x 512
        assert find_batch(pipe, replace(settings, steps=1), "a cat") == 16
    assert tried[:6] == [(size, 2, 7.5) for size in (1, 1, 2, 4, 8, 16)]
    assert tried[6] == (1, 1, 7.5)


def test_small_images_are_not_made_by_the_thousand(base, monkeypatch):
    monkeypatch.setattr(batches, "largest_batch", lambda attempt, sizes, device: sizes[-1])
    with loader_of(base).use(find_models(str(base), {})[0]) as pipe:
        assert find_batch(pipe, settings_of(base), "a cat") == 64


def test_on_a_card_latents_are_decoded_a_few_at_a_time(base, monkeypatch):
    monkeypatch.setattr(sampling, "DECODED", 2 * 32 * 32)
    prompts, seeds = ["a cat", "a dog", "an owl"], [1, 2, 3]
    decode, together, found = AutoencoderKL._decode, [], []

    def counted(self, latents, *arguments, **options):
        together.append(len(latents))
        return decode(self, latents, *arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "_decode", counted)
    for device in ("cpu", "cuda"):
        with loader_of(base, device).use(find_models(str(base), {})[0]) as pipe:
            found.append(make_images(pipe, settings_of(base), prompts, seeds).astype(int))
    assert together == [3, 2, 1]
    assert np.abs(found[0] - found[1]).max() <= 1
    monkeypatch.setattr(sampling, "DECODED", 1)  # an image is larger
    with loader_of(base, "cuda").use(find_models(str(base), {})[0]) as pipe:
        make_images(pipe, settings_of(base), prompts, seeds)
    assert together[3:] == [1, 1, 1]


def test_a_vae_that_memory_left_in_float32_is_in_its_own_precision_again(tmp_path):
    base = write_model(tmp_path / "xl", "sdxl")
    with loader_of(base).use(find_models(str(base), {})[0]) as pipe:
        decode = pipe.vae.decode

        def runs_out(*arguments, **options):
            pipe.vae.to(torch.float64)
            raise torch.OutOfMemoryError("CUDA out of memory")

        pipe.vae.decode = runs_out
        with pytest.raises(torch.OutOfMemoryError):
            make_images(pipe, settings_of(base), ["a cat"], [1])
        assert pipe.vae.dtype == torch.float32
        pipe.vae.decode = decode
        assert make_images(pipe, settings_of(base), ["a cat"], [1]).shape == (1, 32, 32, 3)


def test_a_model_that_does_not_fit_is_told(base, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", full)
    with (
        pytest.raises(FifaError, match=r"cannot load the pipeline.*\n.*\n.*more memory"),
        loader_of(base).use(find_models(str(base), {})[0]),
    ):
        pass


def test_images_are_named_by_the_precision_of_products(base):
    here = settings_of(base)
    assert here.identity == asdict(here)
    assert replace(here, device="cuda").identity["dtype"] == "tf32"
    assert replace(here, device="cuda", dtype="float16").identity["dtype"] == "float16"


def test_an_image_that_cannot_be_written_is_told_and_ends_the_run(base, tmp_path, monkeypatch):
    def full(path, data):
        raise FifaError("cannot write: no space left", where=str(path))

    monkeypatch.setattr(generation, "write_bytes", full)
    with pytest.raises(FifaError, match="no space left"):
        make(base, tmp_path, batch=4)


def test_pipelines_that_are_not_known_give_arrays(base, monkeypatch):
    with loader_of(base).use(find_models(str(base), {})[0]) as pipe:
        tensors = make_images(pipe, settings_of(base), ["a cat", "a dog"], [1, 2])
        monkeypatch.setattr(sampling, "PIPELINES", {})
        arrays = make_images(pipe, settings_of(base), ["a cat", "a dog"], [1, 2])
    np.testing.assert_array_equal(tensors, arrays)
