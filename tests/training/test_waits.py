"""Nothing in a forward or backward pass waits for the device.

A number that Python reads, a copy from memory that is not pinned, and a tensor that is made of
numbers wait for all that is queued there. The meta device stands in for one: it has no numbers to
read, and what is brought to it is seen.
"""

import traceback
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from test_ratings import GOOD, write_images
from tiny_diffusion import KINDS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import assemble, quick

from fifa.training.losses import run_on
from fifa.training.metrics import means_of

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
MADE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


def devices_of(values):
    return {one.device.type for one in tree_leaves(values) if isinstance(one, torch.Tensor)}


def last_file():
    """The file of FiFA's or diffusers' that is at work."""
    stack = [frame.filename for frame in traceback.extract_stack()]
    return [name for name in stack if "/diffusers/" in name or "/fifa/" in name][-1]


class Copied(TorchDispatchMode):
    """Files that copy from the CPU's memory to the device, and wait for it."""

    def __init__(self, files):
        super().__init__()
        self.files = files

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        copied = function.overloadpacket in COPIES and not kwargs.get("non_blocking")
        if copied and "cpu" in devices_of((args, kwargs)) and "meta" in devices_of(found):
            self.files.append(last_file())
        return found


class Made(TorchFunctionMode):
    """Files that make tensors on the device of numbers that are on the host."""

    def __init__(self, files):
        super().__init__()
        self.files = files

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in MADE and found.device == META and found is not args[0]:
            self.files.append(last_file())
        return found


def waits(train, out):
    """A training's files that wait for the device, `META`, in the passes of a micro-batch."""
    loop = assemble(train, out)
    batch = loop.source.batch([(pair, 0) for pair in range(3)]).each(lambda one: one.to(META))
    loop.state.model.to(META)
    loop.source.backbone.device = META
    object.__setattr__(loop.source, "device", META)
    object.__setattr__(loop.state, "running", loop.state.running.to(META))
    files = []
    with ExitStack() as watched:
        watched.enter_context(Copied(files))
        watched.enter_context(Made(files))
        loss, total = loop.forward(batch)
        loss.sum().backward()
        run_on(loop.state.running, *means_of(total, train.batch))
    # the networks of diffusers keep the tables that they copy
    return [name for name in files if "/diffusers/" not in name]


@pytest.mark.parametrize("kind", KINDS)
def test_no_familys_passes_wait_for_the_device(kind, models, world, tmp_path):
    train = replace(quick(world), model=str(models[kind]))
    assert waits(train, tmp_path) == []


@pytest.mark.parametrize(
    "knobs",
    [
        {"loss": "mapo"},
        {"loss": "kto", "dpop": 0.5},
        {"sdpo": 0.8, "beta_target": 1.0},
        {"loss": "smpo", "gradient_checkpointing": True},
        {"method": "full", "loss": "mapo"},
    ],
    ids=str,
)
def test_no_loss_waits_for_the_device(knobs, world, tmp_path):
    assert waits(quick(world, **knobs), tmp_path) == []


def test_no_loss_of_single_images_waits_for_the_device(world, tmp_path):
    write_images(tmp_path / "images.parquet", label=GOOD)
    train = replace(quick(world, loss="kto"), source=str(tmp_path / "images.parquet"))
    assert waits(train, tmp_path / "out") == []
