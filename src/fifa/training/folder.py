"""The folder of a training: what may begin there, and what is there already."""

from __future__ import annotations

import shutil
from pathlib import Path

from fifa.config import Train
from fifa.errors import FifaError
from fifa.shards.files import cannot_write, check_free, sweep, write_text
from fifa.training.checkpoint import CHECKPOINTS, STATE, latest_state
from fifa.training.metrics import STATS

TRAIN_FILE = "train.yaml"
FACTS_FILE = "train.json"
CARD = "README.md"
# What may differ when a training is taken up again: it changes no weight by more than rounding.
FREE = frozenset(
    {"device", "compile", "channels_last", "gradient_checkpointing", "micro_batch"}
    | {"tracker", "log_every", "save_every"}
)


def is_finished(out: Path) -> bool:
    """Whether the training in ``out`` has come to its end."""
    return (out / FACTS_FILE).is_file()


def check_folder(train: Train, out: Path) -> None:
    """Raise `FifaError` unless ``out`` is free, or holds this very training.

    Knobs in `FREE` may differ; until the first state, any may.
    """
    if (out / TRAIN_FILE).is_file():
        begun = latest_state(out) is not None or is_finished(out)
        differences = (
            Train.from_yaml(out / TRAIN_FILE).differences(train, but=FREE) if begun else []
        )
        if differences:
            raise FifaError(
                "the folder holds another training (there / asked): " + "; ".join(differences),
                where=str(out),
                do="choose another --out, or give the same options",
            )
    else:
        check_free(out, "training")


def start_folder(train: Train, out: Path) -> None:
    """Begin in ``out``, or get it ready to go on; raises as `check_folder`."""
    check_folder(train, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    sweep(out)
    for name in (STATE, CHECKPOINTS):
        sweep(out / name)
    if latest_state(out) is None and not is_finished(out):
        # what was begun here got nowhere, and may have been begun with other options
        (out / STATS).unlink(missing_ok=True)
        for name in ("samples", "logs", CHECKPOINTS):
            shutil.rmtree(out / name, ignore_errors=True)
    write_text(out / TRAIN_FILE, train.to_yaml())
