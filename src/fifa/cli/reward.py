"""`fifa reward train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen


@click.group("reward")
def command() -> None:
    """Reward models trained on the feedback itself."""


@command.command("train", cls=KnobCommand, knobs="Reward")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The model's folder.")
def train_command(out: Path, **options: Any) -> None:
    """Train a proxy on SOURCE's labels; score with it as --margin proxy:FOLDER."""
    from fifa.config import Reward
    from fifa.data.read import read_pairs
    from fifa.scoring.rewards.fit import train_reward

    reward = chosen(Reward(), options)
    pairs = read_pairs(reward.read.source, reward.read.format, columns=reward.read.columns)
    click.echo(train_reward(pairs, out, reward).folder)
