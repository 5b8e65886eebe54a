"""The command line's options for a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from fifa.training.config import Train

F = TypeVar("F", bound=Callable[..., Any])

# name, type (None: a pair of switches), help; without a value the preset's or the recipe's holds
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--resolution", int, "Pixels a side.  [default: what the model was made for]"),
    ("--buckets/--crop", None, "Aspect-ratio buckets, or a centre crop."),
    ("--flips/--no-flips", None, "Mirror both images of a pair in half of its presentations."),
    ("--cache-dtype", str, "float16, bfloat16 or float32, of cached latents and embeddings."),
    ("--prompt-dropout", float, "Share of presentations with the empty prompt."),
    ("--method", str, "lora, or full: all weights of the UNet or transformer."),
    ("--rank", int, "Rank of the LoRA."),
    ("--alpha", float, "Alpha of the LoRA.  [default: its rank]"),
    ("--target", "several", "A module that gets an adapter, several times for several."),
    ("--lora-dropout", float, "Dropout of the adapters' inputs."),
    ("--loss", str, "sigmoid (Diffusion-DPO), ipo, hinge, mapo, poly, soft or smpo."),
    ("--beta", float, "Pull towards the base model; docs/training.md converts others' values."),
    ("--poly", float, "a of Poly-DPO."),
    ("--mapo", float, "Weight of MaPO's ratio term."),
    ("--sft", float, "Weight of the winner's error, an anchor."),
    ("--weights/--no-weights", None, "The pairs' own weights in the loss."),
    ("--label", str, "Soft labels of soft and smpo: people, or margin."),
    ("--label-scale", float, "Soft label = sigmoid(scale * margin)."),
    ("--draws", int, "Noise and time from a pool of so many a pair, the reference precomputed."),
    ("--batch", int, "Pairs a step, over all processes."),
    ("--micro-batch", int, "Pairs in a forward pass."),
    ("--steps", int, "How many steps."),
    ("--epochs", float, "How many epochs, where no steps are given."),
    ("--optimizer", str, "adamw, adamw8bit or adafactor."),
    ("--lr", float, "Learning rate."),
    ("--schedule", str, "constant, linear or cosine."),
    ("--warmup", int, "Steps of linear warm-up."),
    ("--weight-decay", float, "Of the optimiser."),
    ("--beta1", float, "Of AdamW."),
    ("--beta2", float, "Of AdamW."),
    ("--epsilon", float, "Of AdamW."),
    ("--clip", float, "Largest norm of the gradient; 0 does not clip."),
    ("--ema", float, "Decay of the weights' moving average, which is then written; 0: none."),
    ("--seed", int, "Of everything random."),
    ("--device", str, "cpu, or leave it to accelerate."),
    ("--dtype", str, "float32, or bfloat16 or float16 under autocast."),
    ("--compile/--no-compile", None, "torch.compile the denoiser."),
    ("--channels-last/--channels-first", None, "Memory of convolutions."),
    ("--gradient-checkpointing/--no-gradient-checkpointing", None, "Less memory, more time."),
    ("--tracker", str, "tensorboard, wandb, trackio or none, beside stats.jsonl."),
    ("--log-every", int, "Steps between two lines of statistics."),
    ("--save-every", int, "Steps between two states to go on from."),
    ("--checkpoint-every", int, "Steps between two sets of weights that are kept; 0: none."),
    ("--sample-every", int, "Steps between two sheets of samples; 0: none."),
    ("--sample-prompt", "several", "A prompt to draw, several times for several."),
    ("--sample-steps", int, "Denoising steps of a sample."),
)


def train_options(function: F) -> F:
    """All of `OPTIONS`, and ``--preset`` and ``--recipe`` which they change."""
    for name, kind, text in reversed(OPTIONS):
        if kind == "several":
            option = click.option(name, name[2:].replace("-", "_") + "s", multiple=True, help=text)
        elif kind is None:
            option = click.option(name, default=None, help=text)
        else:
            option = click.option(name, type=kind, help=text)
        function = option(function)
    recipe = click.option(
        "--recipe", type=click.Path(path_type=Path), help="A train.yaml; options override it."
    )
    preset = click.option("--preset", help="paper-sd15, paper-sdxl or lora-small.")
    return preset(recipe(function))


def training_of(
    source: str | None,
    model: str | None,
    preset: str | None,
    recipe: Path | None,
    options: dict[str, Any],
) -> Train:
    """The training that the command line asks for.

    Raises `FifaError` where preset and recipe are both given, or source or model by neither.
    """
    from fifa.errors import FifaError
    from fifa.training.config import Train, changed, from_yaml
    from fifa.training.config import preset as named

    if preset and recipe:
        raise FifaError("a preset and a recipe at once", do="give one of --preset and --recipe")
    base = from_yaml(recipe) if recipe else named(preset) if preset else Train()
    given = {name: value for name, value in options.items() if value not in (None, ())}
    train = changed(base, source=source, model=model, **given)
    for name, how in (("source", "as the argument"), ("model", "with --model")):
        if not getattr(train, name):
            raise FifaError(f"no {name} to train on", do=f"give it {how}, or in the recipe")
    return train
