"""What stands around the loop: samples, trackers, optimisers, precision, plan, command line."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_diffusion import write_model, write_pairs
from trainings import LORA, assemble, furthest, quick, weights_of

import bucket
import fifa
import fifa.training.job as job_module
from fifa.cli import cli
from fifa.config import Train
from fifa.errors import FifaError
from fifa.training.backbones import load_backbone
from fifa.training.backbones.parts import shapes_in
from fifa.training.batches import adapters_off
from fifa.training.checkpoint import FACTS, TENSORS, add_lora, make_optimizer
from fifa.training.job import check_disk, make_accelerator, plan_training, run_training
from fifa.training.metrics import read_stats
from fifa.training.plan import memory_of, needs_copy
from fifa.training.samples import GAP, Samples

CPU = torch.device("cpu")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_samples_stand_beside_the_bases(method, world, tmp_path):
    prompts = ("a cat", "the moon")
    knobs = {"sample_every": 2, "sample_steps": 2, "sample_prompts": prompts, "lr": 3e-3}
    train = quick(world, steps=4, ema=0.5, method=method, **knobs)
    out = run_training(train, tmp_path / "out")
    folder = out / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [
        "base.png",
        "step-000002.png",
        "step-000004.png",
    ]
    base = pixels(folder / "base.png")
    assert base.shape == (64 + GAP + 64, 64, 3)
    sheets = [pixels(folder / f"step-00000{step}.png") for step in (2, 4)]
    for sheet in sheets:
        assert sheet.shape == (64 + GAP + 64, 64 + GAP + 64, 3)
        assert np.array_equal(sheet[:, :64], base)
        assert not np.array_equal(sheet[:, 64 + GAP :], base)
    assert not np.array_equal(*sheets)
    # drawing changes no weight
    plain = run_training(replace(train, sample_every=0), tmp_path / "plain")
    assert furthest(weights_of(out), weights_of(plain)) == 0.0


def test_memory_that_ends_with_the_samples_is_told_and_the_training_goes_on_without(
    world, tmp_path, monkeypatch
):
    train = quick(world, steps=4, sample_every=3, sample_steps=1, save_every=1)
    made = Samples._made

    def short(self, parts):
        if parts:  # beside the weights that are trained
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made(self, parts)

    monkeypatch.setattr(Samples, "_made", short)
    with pytest.raises(FifaError, match="while sample images were made") as told:
        run_training(train, tmp_path / "out")
    assert "--sample-every 0" in str(told.value)
    out = run_training(replace(train, sample_every=0), tmp_path / "out")
    whole = run_training(replace(train, sample_every=0), tmp_path / "whole")
    assert furthest(weights_of(out), weights_of(whole)) == 0.0


def test_prompts_to_draw_are_the_pairs_unless_given(world, tmp_path):
    loop = assemble(quick(world), tmp_path)
    accelerator = loop.state.accelerator
    captions = ["a", "b", "a", "", "c", "d", "e"]
    samples = Samples(loop.train, loop.source.backbone, captions, tmp_path, accelerator, 64)
    assert samples.prompts == ("a", "b", "c", "d")


def test_tensorboard_reads_what_was_logged(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run_training(quick(world, tracker="tensorboard"), tmp_path / "out")
    events = EventAccumulator(str(out / "logs")).Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({line["step"]: line["loss"] for line in read_stats(out)})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_same_numbers_or_say_what_is_missing(
    name, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        FifaError,
        match=rf"the tracker {name} needs {name}, which cannot be imported.*\n.*pip install",
    ):
        run_training(quick(world, tracker=name), tmp_path / "missing")

    class Fake:
        started, lines, finished = [], [], []

        def init(self, **settings):
            self.started.append(settings)

        def log(self, line, step):
            self.lines.append((step, line["loss"]))

        def finish(self):
            self.finished.append(True)

    fake = Fake()
    monkeypatch.setitem(sys.modules, name, fake)
    out = run_training(quick(world, tracker=name), tmp_path / "out")
    [settings] = fake.started
    assert (settings["project"], settings["resume"]) == ("fifa", "allow")
    assert settings["config"]["beta"] == 500.0
    assert fake.lines == [(line["step"], line["loss"]) for line in read_stats(out)]
    assert fake.finished == [True]

    def refuse(*_, **__):
        raise RuntimeError("no API key\n  is configured")

    monkeypatch.setattr(Fake, "log", refuse)
    train = quick(world, tracker=name)
    assert len(read_stats(run_training(train, tmp_path / "left alone"))) == train.steps
    [told] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("the tracker")
    ]
    assert told == f"the tracker {name} failed, and gets no more: no API key is configured"
    assert fake.finished == [True]

    monkeypatch.setattr(Fake, "init", refuse)
    with pytest.raises(FifaError, match=f"the tracker {name} does not start: no API key is"):
        run_training(train, tmp_path / "refused")
    assert not (tmp_path / "refused" / "cache").exists()  # told before anything is encoded


def test_a_missing_optimiser_is_told_before_anything_is_encoded(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FifaError, match=r"8-bit AdamW needs bitsandbytes"):
        run_training(quick(world, optimizer="adamw8bit"), tmp_path / "out")
    assert not (tmp_path / "out" / "cache").exists()


def test_optimisers_get_the_trainings_settings(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    train = Train(lr=0.1, beta1=0.8, beta2=0.7, epsilon=1e-3, weight_decay=0.5)
    adam = make_optimizer(train, [weight], CPU)
    assert isinstance(adam, torch.optim.AdamW)
    group = adam.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.7), 1e-3)
    assert group["weight_decay"] == 0.5
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        assert make_optimizer(train, [weight], torch.device(device)).defaults["fused"] is fused
    factors = make_optimizer(replace(train, optimizer="adafactor"), [weight], CPU)
    group = factors.param_groups[0]
    assert (group["scale_parameter"], group["relative_step"]) == (False, False)

    class Bits:
        class optim:  # noqa: N801
            @staticmethod
            def AdamW8bit(parameters, **settings):  # noqa: N802
                return settings

    monkeypatch.setitem(sys.modules, "bitsandbytes", Bits)
    assert make_optimizer(replace(train, optimizer="adamw8bit"), [weight], CPU)["lr"] == 0.1


def test_the_precomputed_reference_is_the_online_one(world, tmp_path):
    knobs = {"draws": 3, "prompt_dropout": 0.3, "flips": True, "steps": 4, "lr": 1e-3}
    loop = assemble(quick(world, **knobs), tmp_path / "table")
    online = adapters_off(loop.source.backbone, loop.state.accelerator.unwrap_model)
    for step in range(3):
        for part, _ in loop.parts(step, loop.train.micro_batch):
            batch = loop.source.batch(part)
            known, nothing = loop.reference(batch)
            found, prediction = online(batch)
            assert torch.allclose(known, found, atol=1e-6)
            assert nothing is None
            assert prediction.shape == batch.target.shape
    loop.run()
    other = assemble(quick(world, **knobs), tmp_path / "online")
    source, state = other.source, other.state
    object.__setattr__(
        other, "reference", adapters_off(source.backbone, state.accelerator.unwrap_model)
    )
    other.run()
    assert furthest(loop.state.weights(), other.state.weights()) < 1e-5
    for scalars in read_stats(tmp_path / "table"):
        assert scalars["kl"] is None
        assert scalars["kl_bound"] is not None


def test_training_on_a_pool_follows_the_online_curve():
    from measure_draws import measure

    curves, _ = measure(16, 8, 1, [0, 4], where=["trained on"])
    online, pool = (curves[draws, "trained on"][0, :, 0] for draws in (0, 4))
    gained = math.log(2) - online
    assert gained[-1] > 0.05
    # the first epochs are the very same, the later ones see again what the pool has
    assert pool[2] == pytest.approx(online[2], abs=1e-4)
    assert (np.abs(pool - online) < 0.2 * gained.max()).all()


def test_what_the_table_of_stability_shows_of_a_training():
    from measure_stability import by_loss, mean, numbers_of

    row = {"pairs": "fifa", "loss": "sigmoid", "seed": 1, "steps": [1, 2, 3, 4], "seconds": 1.0}
    row |= {"gain": [0.5, 0.75, 0.25, 0.5], "accuracy": 0.6, "displacement": 1.0, "winner_error": 5}
    numbers = {"seconds": 1.0, "accuracy": 0.6, "winner_error": 5, "displacement": 0.25}
    assert numbers_of(row) == {**numbers, "final": 0.5, "best": 0.75, "at": 2, "fall": 0.5}
    other = {**row, "loss": "SDPO", "gain": [0.0, 0.0, 0.0, 1.0]}
    found = by_loss([row, other, {**row, "seed": 2}], pairs="fifa")  # SDPO lacks seed 2
    assert {loss: one["fall"].tolist() for loss, one in found.items()} == {
        "sigmoid": [0.5],
        "SDPO": [0.0],
    }
    # Student's t at two degrees of freedom: 4.303 times 1 / sqrt(3)
    assert mean(np.array([1.0, 2.0, 3.0])) == "+2.000 (-0.484 to +4.484)"


def test_a_pool_is_computed_once_and_goes_on_where_it_was(world, tmp_path, monkeypatch):
    batches = sys.modules["fifa.training.batches"]
    monkeypatch.setattr(batches, "SHARD", 1)
    calls = []
    predict = batches.predict

    def counted(backbone, batch):
        calls.append(len(batch.items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return predict(backbone, batch)

    monkeypatch.setattr(batches, "predict", counted)
    train = quick(world, draws=2, micro_batch=1)
    with pytest.raises(KeyboardInterrupt):
        assemble(train, tmp_path)
    assemble(train, tmp_path)
    # three were done, the first pair's two on the disk: the second pair's are done again
    assert sum(calls) == 4 + 6
    assemble(train, tmp_path)
    assert sum(calls) == 4 + 6
    assemble(replace(train, seed=1), tmp_path)
    assert sum(calls) == 4 + 6 + 8
    left = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert left == {"images", "moments", "prompts", "reference"}


def test_full_fine_tuning_has_a_frozen_copy_or_a_table(world, tmp_path):
    online = assemble(quick(world, method="full", lr=1e-4), tmp_path / "a")
    batch = online.source.batch([(pair, 0) for pair in range(4)])
    before = online.reference(batch)
    online.run()
    assert all(torch.equal(a, b) for a, b in zip(before, online.reference(batch), strict=True))
    line = read_stats(tmp_path / "a")[-1]
    assert line["kl"] > 0
    table = run_training(quick(world, method="full", lr=1e-4, draws=3), tmp_path / "b")
    # three epochs, three draws: the very same presentations
    final = {k: v.detach() for k, v in online.state.weights().items()}
    assert furthest(final, weights_of(table)) < 1e-5


def test_pairs_of_several_shapes_share_a_step(tmp_path):
    write_model(tmp_path / "sd15")
    wide, tall = ((96, 48), (96, 48)), ((48, 96), (64, 96))
    write_pairs(tmp_path / "pairs.parquet", (wide, tall, wide, wide, tall))
    knobs = {"buckets": True, "flips": True, "prompt_dropout": 0.5, "epsilon": 1e-4}
    train = quick(tmp_path, batch=5, lr=1e-4, **knobs)
    loop = assemble(train, tmp_path / "a")
    parts = [part for part, _ in loop.parts(0, train.micro_batch)]
    sizes = [len(part) for part in parts]
    shapes = [
        {loop.source.encoded.shape(i) for i, _ in part}
        for part, _ in loop.parts(0, loop.train.micro_batch)
    ]
    assert sorted(sizes) == [1, 2, 2]
    assert all(len(one) == 1 for one in shapes)
    assert len(set.union(*shapes)) == 2
    loop.run()
    alone = assemble(replace(train, micro_batch=1), tmp_path / "b")
    alone.run()
    assert furthest(loop.state.weights(), alone.state.weights()) < 1e-5


def test_a_run_folder_is_a_source(shipped, world, tmp_path):
    options = ["--margin", "column:clipscore_0,clipscore_1", "--keep", "3", "--quality", "none"]
    filtered = run("filter", shipped, *options, "--diversity", "none", "--out", tmp_path / "run")
    assert filtered.exit_code == 0
    train = replace(quick(world, draws=1, steps=1), source=str(tmp_path / "run"))
    out = run_training(train, tmp_path / "out")
    kept = {path.name.partition("-")[0] for path in (tmp_path / "run" / "train").iterdir()}
    assert kept == {"images", "moments", "prompts", "reference"}
    assert not (out / "cache").exists()
    selection = json.loads((out / "train.json").read_text())["selection"]
    subset = json.loads((tmp_path / "run" / "subset" / "subset.json").read_text())
    assert selection["digest"] == subset["digest"]
    assert selection["recipe"]["score"]["margin"] == ["column:clipscore_0,clipscore_1"]
    card = (out / "README.md").read_text()
    assert f"3 pairs, strategy fifa, alpha 0.5, gamma 0.5 (subset {subset['digest']}" in card
    assert str(tmp_path) not in card


def test_what_is_encoded_reaches_the_store_that_a_training_is_in(
    shipped, world, tmp_path, monkeypatch
):
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "here"))
    bucket.use(tmp_path / "bucket")
    filtered = "bucket://runs/one"
    how = ["--margin", "column:clipscore_0,clipscore_1", "--keep", 3, "--quality", "none"]
    assert run("filter", shipped, *how, "--diversity", "none", "--out", filtered).exit_code == 0
    options = ["--model", world / "sd15", "--resolution", 64, "--batch", 2, "--tracker", "none"]
    options += ["--device", "cpu", "--steps", 1]
    assert run("train", filtered, *options, "--out", "bucket://runs/trained").exit_code == 0
    run_folder, trained = (bucket.objects(f"runs/{name}") for name in ("one", "trained"))
    assert not any(path.startswith("train/") for path in run_folder)
    kept = {path.split("/")[1].partition("-")[0] for path in trained if path.startswith("cache/")}
    assert kept >= {"images", "moments", "prompts"}
    # in a folder of this machine, trainings on the run share what is encoded
    assert run("train", filtered, *options, "--out", tmp_path / "trained").exit_code == 0
    assert not (tmp_path / "trained" / "cache").exists()
    # inside the run's folder it is the run's again
    assert run("train", filtered, *options, "--out", f"{filtered}/again").exit_code == 0
    assert any(path.startswith("train/moments") for path in bucket.objects("runs/one"))


def test_a_damaged_state_is_told(world, tmp_path):
    loop = assemble(quick(world), tmp_path)
    loop.run()
    tensors, facts = (tmp_path / "state" / "step-000003" / name for name in (TENSORS, FACTS))
    whole, known = tensors.read_bytes(), facts.read_text()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    damaged = [
        (cut, known) for cut in (b"", whole[:100], whole[:-1], bytes(flipped), known.encode())
    ]
    ahead = known.replace('"step": 3', '"step": 1000000000')
    for text in ("", "[]", "{}", "[" * 9999, known[:-9], ahead, known.replace('"sums"', '"sum"')):
        assert text != known
        damaged.append((whole, text))
    for data, text in damaged:
        tensors.write_bytes(data)
        facts.write_text(text)
        with pytest.raises(FifaError, match=r"(?s)state.*step-000003"):
            loop.state.load(tmp_path)
    tensors.write_bytes(whole)
    facts.write_text(known)
    assert loop.state.load(tmp_path).step == 3


def test_mapo_needs_no_reference(world, tmp_path):
    loop = assemble(quick(world, loss="mapo"), tmp_path)
    assert loop.reference is None
    loop.run()
    line = read_stats(tmp_path)[-1]
    assert line["winner_minus_reference"] is None
    assert line["winner_error"] > 0
    assert needs_copy(quick(world, method="full", loss="sigmoid"))
    assert not needs_copy(quick(world, method="full", loss="mapo"))


def test_bfloat16_trains_float32_adapters_on_a_halved_base(world, tmp_path):
    loop = assemble(quick(world, dtype="bfloat16"), tmp_path)
    kinds = {p.requires_grad: p.dtype for p in loop.state.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    loop.run()
    lines = read_stats(tmp_path)
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["kl"] > 0


def test_one_process_computes_in_one_precision(world):
    make_accelerator(quick(world))
    with pytest.raises(FifaError, match="start a new process"):
        make_accelerator(quick(world, dtype="bfloat16"))


def test_margins_become_labels_where_the_source_has_them(world, tmp_path):
    with pytest.raises(FifaError, match="4 of 4 pairs have no margin"):
        assemble(quick(world, loss="smpo", label="margin"), tmp_path / "a")
    margins = [0.3, -0.2, 0.1, 0.4]  # of image 0 over image 1
    write_pairs(tmp_path / "pairs.parquet", signed_margin=[abs(m) for m in margins])
    knobs = {"loss": "smpo", "label": "margin", "label_scale": 2.0}
    train = replace(quick(world, **knobs), source=str(tmp_path / "pairs.parquet"))
    loop = assemble(train, tmp_path / "b")
    batch = loop.source.batch([(0, 0), (3, 0)])
    expected = torch.sigmoid(2.0 * torch.from_numpy(loop.source.pairs.margin[[0, 3]]))
    assert torch.allclose(batch.label, expected)


def test_memory_is_counted_from_the_files_headers(world):
    shapes = shapes_in(world / "sd15" / "unet")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(world / "sd15", subfolder="unet")
    whole = sum(p.numel() for p in unet.parameters())
    assert sum(map(math.prod, shapes.values())) == whole
    train = quick(world, rank=3)
    from peft import LoraConfig

    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=3, target_modules=list(targets)))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    half = load_backbone(train.model, dtype="bfloat16")
    lora = memory_of(train, half, 64, "bfloat16")
    assert lora.weights == 2 * whole + 4 * trained
    assert lora.training == trained * (4 + 8)
    plain = load_backbone(train.model)
    full = memory_of(replace(train, method="full", ema=0.9), plain, 64, "float32")
    assert full.weights == 2 * 4 * whole
    assert full.training == whole * (4 + 8 + 4)
    table = memory_of(replace(train, method="full", draws=2), plain, 64, "float32")
    assert table.weights == 4 * whole


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux-dev", "klein"])
def test_the_plan_counts_the_familys_adapters(kind, tmp_path):
    train = Train(model=str(write_model(tmp_path, kind)), rank=3)
    backbone = load_backbone(train.model)
    trained = sum(p.numel() for p in add_lora(backbone, train))
    memory = memory_of(train, backbone, 64, "float32")
    assert memory.training == trained * (4 + 8)


def test_a_batch_has_a_pair_for_every_process(world):
    from fifa.training.job import check_share

    with pytest.raises(FifaError, match="cannot be shared by 8 processes"):
        check_share(quick(world, batch=4), 8)


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command_line_trains(world, tmp_path):
    given = ["train", world / "pairs.parquet", "--model", world / "sd15", "--resolution", 64]
    given += ["--steps", 2, "--batch", 2, "--tracker", "none", "--device", "cpu", "--lr", "1e-3"]
    given += ["--preset", "lora-small", "--target", "to_q", "--target", "to_k", "--rank", 2]
    plan = run(*given, "--out", tmp_path / "out", "--dry-run")
    assert "steps: 2" in plan.output
    assert "steps       2 of 2 pairs" in plan.output
    assert not (tmp_path / "out").exists()
    done = run(*given, "--out", tmp_path / "out")
    assert done.output.splitlines()[-1] == str(tmp_path / "out")
    assert (tmp_path / "out" / LORA).exists()
    recipe = Train.from_yaml(tmp_path / "out" / "train.yaml")
    assert (recipe.targets, recipe.rank, recipe.alpha) == (("to_q", "to_k"), 2, 8.0)
    again = run("train", "--recipe", tmp_path / "out" / "train.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert furthest(weights_of(tmp_path / "out"), weights_of(tmp_path / "again")) == 0.0


def test_a_dry_run_prints_what_is_needed_and_refuses_what_does_not_fit(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(job_module, "free_bytes", lambda device: 1000)
    given = ["train", world / "pairs.parquet", "--model", world / "sd15", "--resolution", 64]
    given += ["--steps", 2, "--batch", 2, "--device", "cpu", "--out", tmp_path / "out"]
    with pytest.raises(FifaError, match=r"too little memory: training needs about 1\.\d MB"):
        run(*given, "--dry-run")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FifaError, match="too little memory"):
        run(*given)


def test_the_command_line_says_what_is_missing(world, tmp_path):
    for more, message in (
        ((), "no source"),
        ((world / "pairs.parquet",), "no model"),
        (("--preset", "lora-small", "--recipe", tmp_path / "x.yaml"), "at once"),
    ):
        with pytest.raises(FifaError, match=message):
            run("train", *more, "--out", tmp_path / "out")


def test_every_knob_has_an_option():
    from dataclasses import fields

    command = cli.commands["train"]
    params = command.get_params(click.Context(command))
    names = {parameter.name for parameter in params}
    asked = {field.name for field in fields(Train)} - {"cluster"}
    assert asked | {field.name for field in fields(Train().cluster)} <= names
    assert all(option.help for option in params if isinstance(option, click.Option))


def test_the_function_trains_as_the_command_does(world, tmp_path):
    out = fifa.train(
        world / "pairs.parquet",
        world / "sd15",
        tmp_path / "out",
        quick(world),
        steps=1,
    )
    assert json.loads((out / "train.json").read_text())["steps"] == 1


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux-dev", "qwenimage", "sana"])
def test_every_family_trains_and_resumes(kind, tmp_path):
    write_model(tmp_path / kind, kind)
    write_pairs(tmp_path / "pairs.parquet")
    train = quick(tmp_path, kind, steps=2, draws=1, gradient_checkpointing=True)
    out = run_training(train, tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in weights_of(out).values())
    facts = json.loads((out / "train.json").read_text())
    assert facts["family"] == kind.partition("-")[0]


def test_prompts_that_are_not_cached_train_alike(world, tmp_path):
    weights = []
    for keep in (True, False):
        train = quick(world, steps=2, prompt_dropout=0.5, cache_prompts=keep)
        weights.append(weights_of(run_training(train, tmp_path / str(keep))))
    assert furthest(*weights) < 1e-6
    assert not list((tmp_path / "False" / "cache").glob("prompts-*"))
    plan = plan_training(train, tmp_path / "plan")
    assert "prompts are encoded at every step" in str(plan) and plan.prompts == 0
    kept = plan_training(replace(train, cache_prompts=True), tmp_path / "plan")
    assert plan.memory.weights == kept.memory.weights + kept.memory.text


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_disk(tmp_path / "cache", 10**8, 8 * 10**8)
    with pytest.raises(FifaError, match=r"needs about 39.1\d GB, 1.00 GB are free[\s\S]*39.00 GB"):
        check_disk(tmp_path / "cache", 10**8 + 1, 39 * 10**9)


def test_a_distilled_model_is_trained_with_a_warning(models, world, tmp_path):
    for kind, said in (("flux-schnell", True), ("flux-dev", False)):
        train = replace(quick(world), model=str(models[kind]))
        plan = str(plan_training(train, tmp_path / "out"))
        assert ("warning     FLUX schnell was distilled" in plan) == said
        assert ("load the LoRA into both" in plan) == said
    card = run_training(
        replace(train, model=str(models["flux-schnell"]), steps=1), tmp_path / "out"
    )
    assert "FLUX schnell was distilled to few steps" in (card / "README.md").read_text()
