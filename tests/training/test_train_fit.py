"""How many pairs go through the network at once, and what happens when memory runs out."""

import json
import math
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from trainings import assemble, fresh_process, furthest, quick, weights_of

import fifa.training.backbones as backbones_module
import fifa.training.batches as batches_module
import fifa.training.fit as fit_module
import fifa.training.holdout as holdout_module
import fifa.training.job as job_module
import fifa.training.loop as loop_module
from fifa.config import changed
from fifa.errors import FifaError
from fifa.training.checkpoint import make_state
from fifa.training.fit import FIT, Fit, find_fit
from fifa.training.job import on_device, run_training
from fifa.training.loop import Feed
from fifa.training.metrics import read_stats


def open_quick(world, **knobs):
    return replace(quick(world, **knobs), micro_batch=None)


def fit_of(loop):
    return find_fit(loop.train, loop.source, loop.state, loop.forward, loop.out)


class Device(str):
    """The processor, as a CUDA device."""

    type = "cuda"


def pretend(loop, monkeypatch, fits):
    """A CUDA device for `find_fit` alone, which bears what ``fits`` says of (on, wanted)."""
    tried = []

    def largest(attempt, sizes, device, *, reserved, share):
        attempt(1)
        twice = loop.state.model.is_gradient_checkpointing
        tried.append((twice, sizes[-1], reserved))
        return fits(twice, share)

    monkeypatch.setattr(fit_module, "largest_batch", largest)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(fit_module.Batch, "on", lambda self, device: self)
    monkeypatch.setattr(batches_module, "pinned", lambda tensor, device: tensor)
    monkeypatch.setattr(torch, "tensor", lambda values, **where: torch.as_tensor(values))
    object.__setattr__(loop.source, "device", Device("cpu"))
    return tried


def copies_as_on_cuda(monkeypatch):
    """What goes to a `Device` has to be pinned, and waits for nobody."""
    held, to = [], torch.Tensor.to

    def pin(tensor, device):
        held.append(tensor.clone())
        return held[-1]

    def copied(self, *where, **how):
        if where and isinstance(where[0], Device):
            assert how == {"non_blocking": True}
            assert any(self is one for one in held)
        return to(self, *where, **how)

    monkeypatch.setattr(batches_module, "pinned", pin)
    monkeypatch.setattr(torch.Tensor, "to", copied)


def run_as_on_cuda(loop, monkeypatch):
    """`Loop.run` as on a CUDA device: batches made in a thread, numbers read a step late."""
    copies_as_on_cuda(monkeypatch)
    monkeypatch.setattr(loop_module, "peak_bytes", lambda device: 0)
    monkeypatch.setattr(loop_module, "find_fit", lambda train, *_: Fit(train.micro_batch, False))
    object.__setattr__(loop.source, "device", Device("cpu"))
    return loop.run()


def test_on_a_processor_the_size_of_the_latents_decides(world, tmp_path):
    # 64 pixels a side are 32 x 32 latents here: four pairs make 4,096 of them
    loop = assemble(open_quick(world, batch=6), tmp_path)
    height, width = loop.source.encoded.shape(0)
    assert fit_of(loop) == Fit(-(-6 // -(-6 // (4096 // (height * width)))), False)
    assert not (tmp_path / FIT).exists()


def test_a_device_is_tried_once_and_remembered(world, tmp_path, monkeypatch):
    loop = assemble(open_quick(world, batch=8), tmp_path)
    tried = pretend(loop, monkeypatch, lambda twice, share: 4)
    trained = [p for p in loop.state.model.parameters() if p.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    assert fit_of(loop) == Fit(4, False)
    assert tried == [(False, 8, 8 * numbers)]  # AdamW's two float32 are still to come
    assert all(parameter.grad is None for parameter in trained)
    assert json.loads((tmp_path / FIT).read_text())["micro_batch"] == 4
    assert fit_of(loop) == Fit(4, False)
    assert len(tried) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    fit_of(loop)
    assert len(tried) == 2


def test_what_fits_is_found_again_where_another_process_does_not_know_it(
    world, tmp_path, monkeypatch
):
    loop = assemble(open_quick(world, batch=8), tmp_path)
    tried = pretend(loop, monkeypatch, lambda twice, share: 4)
    fit_of(loop)
    accelerator = loop.state.accelerator
    gather = accelerator.gather
    other = {torch.bool: torch.tensor([False]), torch.int64: torch.tensor([2])}  # the process's
    accelerator.gather = lambda own: torch.cat([gather(own), other[own.dtype]])
    assert fit_of(loop) == Fit(2, False)
    assert len(tried) == 2


def test_activations_are_computed_twice_only_where_one_pair_does_not_fit(
    world, tmp_path, monkeypatch
):
    loop = assemble(open_quick(world, batch=8), tmp_path)
    tried = pretend(loop, monkeypatch, lambda twice, share: 3 if twice else 0)
    assert fit_of(loop) == Fit(3, True)
    assert [twice for twice, *_ in tried] == [False, True]
    assert loop.state.model.is_gradient_checkpointing
    loop.state.checkpoint_gradients(False)
    assert fit_of(loop) == Fit(3, True)  # as remembered
    assert loop.state.model.is_gradient_checkpointing


def test_what_is_asked_for_is_not_looked_for(world, tmp_path, monkeypatch):
    train = changed(quick(world, batch=8), micro_batch=2, gradient_checkpointing=False)
    loop = assemble(train, tmp_path)
    tried = pretend(loop, monkeypatch, lambda twice, share: 8)
    assert fit_of(loop) == Fit(2, False)
    assert not tried


def test_a_single_pair_may_take_all_there_is(world, tmp_path, monkeypatch):
    loop = assemble(open_quick(world, batch=8), tmp_path)
    tried = pretend(loop, monkeypatch, lambda twice, share: int(share == 1))
    assert fit_of(loop) == Fit(1, True)
    assert [(twice, most) for twice, most, _ in tried] == [(False, 8), (True, 8), (True, 1)]


def test_not_even_one_pair(world, tmp_path, monkeypatch):
    loop = assemble(open_quick(world), tmp_path)
    pretend(loop, monkeypatch, lambda twice, share: 0)
    with pytest.raises(FifaError, match="out of memory with a single pair"):
        fit_of(loop)


def test_a_step_that_runs_out_of_memory_is_done_again_with_smaller_micro_batches(
    world, tmp_path, monkeypatch, capsys
):
    train = quick(world, batch=8, micro_batch=8, lr=1e-4)
    calm = assemble(train, tmp_path / "calm")
    calm.run()
    loop = assemble(train, tmp_path / "short")
    forward, sizes = type(loop).forward, []

    def short(self, batch):
        sizes.append(len(batch.items))
        if len(batch.items) > 2 and len(sizes) > 1:  # memory runs out in the second step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(type(loop), "forward", short)
    loop.run()
    assert sizes == [8, 8, 4, *[2] * 8]
    assert capsys.readouterr().err.count("pairs a micro-batch from here on") == 2
    assert furthest(calm.state.weights(), loop.state.weights()) < 1e-5
    lines = [[line["loss"] for line in read_stats(tmp_path / name)] for name in ("calm", "short")]
    assert lines[0] == pytest.approx(lines[1], abs=1e-4)


def test_memory_that_a_single_pair_exhausts_is_told(world, tmp_path, monkeypatch):
    def short(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop_module.Loop, "forward", short)
    with pytest.raises(FifaError, match="out of memory: CUDA out of memory"):
        run_training(quick(world, micro_batch=1), tmp_path / "out")


def test_micro_batches_made_in_a_thread_are_the_same_ones(world, tmp_path):
    loop = assemble(quick(world, steps=5), tmp_path)
    here, ahead = Feed(loop, 2, ahead=False), Feed(loop, 2, ahead=True)
    for step in (0, 1, 3, 4):  # a jump: as where a training is taken up again
        one, other = list(here.items(step)), list(ahead.items(step))
        assert [(b.items, *more) for b, *more in one] == [(b.items, *more) for b, *more in other]
        for (mine, *_), (theirs, *_) in zip(one, other, strict=True):
            assert torch.equal(mine.noisy, theirs.noisy)
    ahead.size = 1
    assert [len(batch.items) for batch, *_ in ahead.items(4)] == [1, 1, 1, 1]
    ahead.close()


def test_numbers_read_a_step_late_train_the_same(world, tmp_path, monkeypatch):
    train = quick(world, steps=5, save_every=2, holdout=0.5, validate_every=2, ema=0.9)
    here, there = (assemble(train, tmp_path / name) for name in ("here", "there"))
    assert here.run().step == 5
    batch, made = batches_module.Source.batch, []

    def noted(self, items):
        made.append((threading.current_thread() is threading.main_thread(), items[0][1] < 0))
        return batch(self, items)

    monkeypatch.setattr(batches_module.Source, "batch", noted)
    assert run_as_on_cuda(there, monkeypatch).step == 5
    assert set(made) == {(False, False), (True, True)}  # held-out pairs are measured in between
    assert furthest(here.state.averaged(), there.state.averaged()) == 0.0
    lines = [
        [{**line, "seconds": 0, "pairs_per_second": 0, "peak_bytes": 0} for line in read_stats(out)]
        for out in (here.out, there.out)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("broken", [3, 4])  # before a state is written, and the step before
def test_of_a_step_that_is_not_finite_nothing_is_written(bad, broken, world, tmp_path, monkeypatch):
    train = quick(world, steps=6, save_every=2, log_every=1, micro_batch=4)
    loop = assemble(train, tmp_path / "broken")
    whole = assemble(train, tmp_path / "whole")
    whole.run()
    forward, calls = type(loop).forward, []

    def breaking(self, batch):
        loss, told = forward(self, batch)
        calls.append(batch)
        if len(calls) < broken:
            return loss, told
        # the square root of 0 is 0, and has no slope
        return (loss * torch.nan, told * torch.nan) if bad == "loss" else ((loss * 0).sqrt(), told)

    monkeypatch.setattr(type(loop), "forward", breaking)
    with pytest.raises(FifaError, match=f"the {bad} is not finite in step {broken}"):
        run_as_on_cuda(loop, monkeypatch)
    assert [path.name for path in (loop.out / "state").iterdir()] == ["step-000002"]
    assert [line["step"] for line in read_stats(loop.out)] == list(range(1, broken))
    monkeypatch.undo()
    again = assemble(train, tmp_path / "broken")
    assert again.run().step == 6
    assert furthest(again.state.weights(), whole.state.weights()) == 0.0


def test_memory_that_ends_where_batches_are_made_halves_them_too(
    world, tmp_path, monkeypatch, capsys
):
    train = quick(world, batch=4, micro_batch=4, lr=1e-4)
    calm, loop = (assemble(train, tmp_path / name) for name in ("calm", "short"))
    calm.run()
    batch = batches_module.Source.batch

    def short(self, items):  # memory to be copied from is pinned here, in a thread
        if len(items) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return batch(self, items)

    monkeypatch.setattr(batches_module.Source, "batch", short)
    assert run_as_on_cuda(loop, monkeypatch).step == 3
    assert "1 pairs a micro-batch from here on" in capsys.readouterr().err
    assert furthest(calm.state.weights(), loop.state.weights()) < 1e-5


def test_errors_without_gradients_are_computed_in_halves_too(world, tmp_path, monkeypatch, capsys):
    """The table of the reference's, those of the order and of held-out pairs, and measurements."""
    knobs = {"draws": 2, "order": "easy-first", "order_by": "implicit", "holdout": 0.5}
    train = quick(world, batch=2, micro_batch=2, steps=1, **knobs)
    calm = assemble(train, tmp_path / "calm")
    predict, sizes = batches_module.predict, []

    def short(backbone, batch):
        sizes.append(len(batch.items))
        if len(batch.items) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(backbone, batch)

    with monkeypatch.context() as patch:
        patch.setattr(batches_module, "predict", short)
        loop = assemble(train, tmp_path / "short")
        assert sizes
        sizes.clear()
        patch.setattr(holdout_module, "predict", short)
        found = loop.holdout.measure(loop.state, 2)
        assert sizes == [2] + [1] * 8  # two pairs, four draws
        assert loop.holdout.measure(loop.state, 2) == found
    assert sizes[9:] == [1] * 8
    assert capsys.readouterr().err.count("1 pairs at a time from here on") == 4
    expected = calm.holdout.measure(calm.state, 2)
    for name in ("heldout_loss", "heldout_winner_error", "heldout_loser_minus_reference"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    batch = loop.source.batch([(loop.source.taught[0], 0)])
    torch.testing.assert_close(loop.reference(batch)[0], calm.reference(batch)[0])


def test_the_table_is_made_as_on_cuda_of_few_batches_at_a_time(world, tmp_path, monkeypatch):
    train = quick(world, draws=4, micro_batch=1)
    here = assemble(train, tmp_path / "here")
    source, rows, draws = here.source, [0, 1, 2, 3], range(4)
    [(_, expected)] = batches_module._errors(source, rows, draws, [0], nullcontext)
    made, ahead = [], []
    batch, predict = batches_module.Source.batch, batches_module.predict

    def counted(self, items):
        made.append(threading.current_thread() is threading.main_thread())
        return batch(self, items)

    def watched(backbone, one):
        ahead.append(len(made) - len(ahead))
        return predict(backbone, one)

    monkeypatch.setattr(batches_module.Source, "batch", counted)
    monkeypatch.setattr(batches_module, "predict", watched)
    copies_as_on_cuda(monkeypatch)
    there = replace(source, device=Device("cpu"))
    [(_, found)] = batches_module._errors(there, rows, draws, [0], nullcontext)
    assert found == expected
    assert made == [False] * 16 and max(ahead) <= 4


def test_what_fails_where_batches_are_made_is_told(world, tmp_path, monkeypatch):
    loop = assemble(quick(world), tmp_path)

    def broken(self, items):
        raise FifaError("a shard of the cache cannot be read")

    monkeypatch.setattr(batches_module.Source, "batch", broken)
    with pytest.raises(FifaError, match="a shard of the cache"):
        run_as_on_cuda(loop, monkeypatch)


def test_cudnns_attention_is_off_in_training_and_as_it_was_after(world, tmp_path, monkeypatch):
    forward, seen = loop_module.Loop.forward, set()

    def watched(self, batch):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, batch)

    monkeypatch.setattr(loop_module.Loop, "forward", watched)
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        run_training(quick(world, steps=1), tmp_path / str(before))
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
        with pytest.raises(ValueError, match="broken"), on_device(torch.device("cpu")):
            raise ValueError("broken")
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert seen == {False}


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
def test_a_batch_is_the_same_under_autocast(cache_dtype, world, tmp_path):
    source = assemble(quick(world, cache_dtype=cache_dtype), tmp_path).source
    batch = source.batch([(0, 0), (1, 0)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = source.batch([(0, 0), (1, 0)])
    for name in ("noisy", "target", "time", "label", "weight"):
        one, two = getattr(batch, name), getattr(other, name)
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_known_errors_of_the_reference_are_copied_without_a_wait(monkeypatch):
    copies_as_on_cuda(monkeypatch)
    scalars = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    known = batches_module.table(scalars, [4, 7, 9], [0, 1], Device("cpu"))
    found, _ = known(SimpleNamespace(items=[(9, 1), (4, 0)]))
    assert found.tolist() == [[10, 11], [0, 1]]


@pytest.mark.parametrize("draws", [0, 2])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_precision_trains_on_a_processor(dtype, cache_dtype, draws, world, tmp_path):
    train = quick(world, dtype=dtype, cache_dtype=cache_dtype, draws=draws, steps=1)
    with fresh_process():
        out = run_training(train, tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in weights_of(out).values())


def with_loss_scale(state):
    """``state`` as in float16: the first gradients overflow, a millionth of them does not."""
    accelerator = state.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-20)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    optimizer = AcceleratedOptimizer(state.optimizer.optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [optimizer]
    return replace(state, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_steps_whose_gradients_overflow_are_skipped_and_counted(
    optimizer, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(job_module, "make_state", lambda *of: with_loss_scale(make_state(*of)))
    step, same = loop_module.Loop.step, []

    def watched(self, *of):
        both = self.state.weights, self.state.averaged
        before = [{name: value.clone() for name, value in one().items()} for one in both]
        read = step(self, *of)
        same.append([furthest(old, one()) == 0.0 for old, one in zip(before, both, strict=True)])
        return read

    monkeypatch.setattr(loop_module.Loop, "step", watched)
    train = quick(world, steps=3, ema=0.5, optimizer=optimizer, beta=5000.0)
    out = run_training(train, tmp_path / "out")
    assert same == [[True, True], [False, False], [False, False]]

    def refused(word):
        raise AssertionError(f"{word} is no JSON")

    text = (out / "stats.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refused) for line in text]
    assert [line["skipped"] for line in lines] == [1, 1, 1]
    assert [line["pairs"] for line in lines] == [0, 4, 8]
    assert [line["gradient_norm"] is None for line in lines] == [True, False, False]
    facts = json.loads((out / "train.json").read_text())
    assert (facts["steps"], facts["skipped_steps"], facts["pairs_seen"]) == (3, 1, 8)


def test_a_training_that_goes_on_has_the_loss_scale_that_it_had(world, tmp_path):
    train = quick(world, steps=4, beta=5000.0)

    def done(out, until=None):
        with fresh_process():
            loop = assemble(train, tmp_path / out)
            loop = replace(loop, state=with_loss_scale(loop.state), until=until)
            return loop.run().skipped, loop.state.weights()

    (skipped, whole), (first, _), (after, parts) = done("a"), done("b", 2), done("b")
    assert (skipped, first, after) == (1, 1, 1)
    assert furthest(whole, parts) == 0.0


def test_a_loss_scale_that_falls_for_ever_ends_the_training(world, tmp_path, monkeypatch):
    loop = assemble(quick(world, steps=60, log_every=20), tmp_path)
    loop = replace(loop, state=with_loss_scale(loop.state))
    before = {name: value.clone() for name, value in loop.state.weights().items()}
    forward = type(loop).forward

    def broken(self, batch):
        loss, told = forward(self, batch)
        return (loss * 0).sqrt(), told  # the square root of 0 is 0, and has no slope

    monkeypatch.setattr(type(loop), "forward", broken)
    with pytest.raises(FifaError, match="the gradient is not finite in step 40"):
        loop.run()
    assert furthest(before, loop.state.weights()) == 0.0


def test_under_autocast_adapters_do_not_widen_their_inputs_and_compute_the_same(world, tmp_path):
    with fresh_process():
        loop = assemble(quick(world, dtype="bfloat16"), tmp_path)
        layers = [m for m in loop.state.model.modules() if hasattr(m, "lora_A")]
        assert layers
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for weight in loop.state.weights().values():
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        batch = loop.source.batch([(0, 0), (1, 0)])
        with torch.no_grad():
            lean, _ = loop.forward(batch)
            for layer in layers:
                layer.cast_input_dtype_enabled = True
            assert torch.equal(lean, loop.forward(batch)[0])


@pytest.mark.parametrize(
    ("cuda", "configured", "asked", "expected"),
    [
        (True, None, None, "bf16"),
        (True, "no", None, "bf16"),  # what `accelerate launch` says where nobody has chosen
        (True, "fp16", None, "fp16"),
        (True, "bf16", "float32", "no"),
        (True, "fp8", "bfloat16", "bf16"),
        (False, None, None, "no"),
        (False, "bf16", None, "bf16"),
    ],
)
def test_the_fastest_precision_is_the_default(
    monkeypatch, world, cuda, configured, asked, expected
):
    import fifa.training.job as job

    given = []
    monkeypatch.setattr("accelerate.Accelerator", lambda **how: given.append(how))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(job, "best_dtype", {"cuda": "bfloat16", "cpu": "float32"}.get)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if configured:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    job.make_accelerator(replace(quick(world), device=None, dtype=asked))
    assert given[0]["mixed_precision"] == expected


def test_a_precision_that_only_accelerate_knows_is_refused(monkeypatch, world):
    from fifa.training.job import make_accelerator

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(FifaError, match="configured for fp8"):
        make_accelerator(replace(quick(world), dtype=None))


@pytest.fixture
def encoders_as_on_cuda(monkeypatch):
    """Encoders compute in what training computes in, also where the base is in float32."""
    real = backbones_module.open_folder

    def open_folder(model, device, dtype, encoding, kept):
        return real(model, device, dtype, torch.bfloat16, kept)

    monkeypatch.setattr(backbones_module, "open_folder", open_folder)


@pytest.mark.parametrize(
    "trainings",
    [
        [("lora", "bfloat16"), ("full", "bfloat16")],  # of weights in bfloat16, and in float32
        [("full", "float32"), ("full", "bfloat16")],
    ],
)
def test_what_the_base_computes_otherwise_is_another_reference(
    trainings, world, tmp_path, encoders_as_on_cuda
):
    for method, dtype in trainings:  # in one cache, as trainings on one run
        with fresh_process():
            train = quick(world, method=method, dtype=dtype, draws=1, beta=5000.0)
            loop = assemble(train, tmp_path)
            with torch.no_grad():
                loss, _ = loop.forward(loop.source.batch([(pair, 0) for pair in range(4)]))
        # against its own base a pair's logit is 0
        assert loss.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-3)


def test_a_processor_does_not_train_in_float16(world, tmp_path):
    for method in ("lora", "full"):
        with pytest.raises(FifaError, match="does not train in float16") as told:
            run_training(quick(world, dtype="float16", method=method), tmp_path / method)
        assert "bfloat16" in str(told.value)
