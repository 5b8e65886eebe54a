"""A training loop that can be killed: seeded by step, checkpointed by the clock, timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fifa.shards.files import atomic_path

EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    ``lr`` rises over ``warmup`` steps and falls to zero along a cosine; ``ema`` is the decay of
    the averaged weights that are kept (0: the last ones).
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    ema: float = 0.0
    weight_decay: float = 1e-4
    clip: float = 1.0


def train(
    name: str,
    modules: torch.nn.ModuleDict,
    loss: Callable[[int, np.random.Generator], torch.Tensor],
    plan: Plan,
    work: Path,
) -> None:
    """Minimise ``loss(step, rng)`` over ``modules``, which end with the weights to ship.

    A checkpoint lies in ``work``/<name>.pt, with the CPU seconds until then; a finished one is
    only loaded. Each step's noise comes from (name, step), so that a resumed run draws what an
    unbroken one would.
    """
    path = work / f"{name}.pt"
    learned = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        step, average, spent = state["step"], state["average"], state["seconds"]
        modules.load_state_dict(state["modules"])
        if step < plan.steps:
            optimizer.load_state_dict(state["optimizer"])
    modules.train()
    saved, before, first = time.monotonic(), spent - time.process_time(), step
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _schedule(step, plan)
        torch.manual_seed(_seed(name, step))
        value = loss(step, np.random.default_rng(_seed(name, step)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), plan.clip)
        optimizer.step()
        step += 1
        decay = min(plan.ema, (1 + step) / (10 + step)) if plan.ema else 0.0
        with torch.no_grad():
            for key, tensor in modules.state_dict().items():
                if tensor.is_floating_point():
                    average[key].lerp_(tensor, 1 - decay)
                else:
                    average[key].copy_(tensor)
        if step % 50 == 0:
            rate = (before + time.process_time() - spent) / (step - first)
            print(f"{name} {step}/{plan.steps} loss {value.item():.4f}, {rate:.3f} s", flush=True)
        if time.monotonic() - saved > EVERY or step == plan.steps:
            saved = time.monotonic()
            last = step == plan.steps
            seconds = before + time.process_time()
            state = {"step": step, "seconds": seconds, "average": average}
            state["modules"] = modules.state_dict()
            state |= {} if last else {"optimizer": optimizer.state_dict()}
            with atomic_path(path) as temporary:
                torch.save(state, temporary)
    modules.load_state_dict(average)
    modules.eval()


def seconds(work: Path) -> dict[str, int]:
    """CPU seconds that each training took."""
    names = ("vae", "decoder", "base", "judges", "clip")
    states = {name: torch.load(work / f"{name}.pt", weights_only=True) for name in names}
    return {name: round(state["seconds"]) for name, state in states.items()}


def _schedule(step: int, plan: Plan) -> float:
    rise = min(1.0, (step + 1) / plan.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def _seed(name: str, step: int) -> int:
    return int.from_bytes(name.encode()[:4], "big") * 1_000_003 + step
