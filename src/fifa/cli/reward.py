"""`fifa reward train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen


@click.group("reward")
def command() -> None:
    """Train a reward model on the feedback."""


@command.command("train", cls=KnobCommand, knobs="Reward")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The folder of the reward model."
)
def train_command(out: Path, **options: Any) -> None:
    """Train a reward model on labelled pairs.

    It learns from the labels of SOURCE; `--margin proxy:FOLDER` then scores with it. Without
    --base it is a small head on frozen features, and only the options that begin with "Head"
    apply; with --base MODEL a CLIP is fine-tuned, and those that begin with "CLIP" apply.
    """
    from fifa.config import Reward
    from fifa.data.read import read_pairs
    from fifa.scoring.rewards.fit import train_reward

    reward = chosen(Reward(), options)
    pairs = read_pairs(reward.read.source, reward.read.format, columns=reward.read.columns)
    click.echo(train_reward(pairs, out, reward).folder)
