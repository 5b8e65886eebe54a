"""A training whose weights are sharded over processes (FSDP2), on CPUs.

accelerate offers FSDP on accelerators only. Here it is told that these processes were such; what
then shards, gathers, saves and loads is accelerate's and PyTorch's own code, over gloo.
"""

import sys
from importlib import import_module

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from fifa.config import Train

job, loop = import_module("fifa.training.job"), import_module("fifa.training.loop")
prepared, step = job.make_state, loop.Loop.step


def make_state(train, backbone, accelerator):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
        reshard_after_forward=True,
    )
    accelerator.state.fsdp_plugin = plugin
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)
    Accelerator.is_fsdp2 = property(lambda self: True)
    state = prepared(train, backbone, accelerator)
    sharded = [type(p).__name__ == "DTensor" for p in state.model.parameters()]
    assert all(sharded), "the weights are not sharded"
    return state


def train(recipe, out, stop=0):
    """Run a recipe's training; where asked, every process leaves it at the step ``stop``."""
    torch.set_num_threads(1)

    def stopped(self, number, *more):
        if number == stop:
            sys.exit(3)
        return step(self, number, *more)

    job.make_state, loop.Loop.step = make_state, stopped
    job.run_training(Train.from_yaml(recipe), out)
