"""The search for a training's knobs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fifa.config.evaluate import Generate
from fifa.config.knobs import Count, Knobs, Option, knobs
from fifa.config.train import Train

# In the folder of a search: these knobs, and what `fifa train --recipe` takes, written last
TUNE_FILE, BEST_FILE = "tune.yaml", "best.yaml"


@knobs
class Tune(Knobs):
    """A search for the knobs of a training, by short parts of it.

    ``images`` says how the last trials make their images.

    Parameters
    ----------
    over
        The knobs to search, with commas between them: ``lr=1e-6..1e-4,beta=500,2000,5000``.
        A range is searched on a log scale. A bare ``lr`` or ``beta`` is a range from a tenth of the
        training's own value to ten times it.
    budget
        Steps of all trials together, or a fraction or percentage of the steps of the training.
    trials
        Settings to begin with. Two thirds of them end early, then two thirds of the others.
    prompts
        Prompts on which the last trials make images: text, CSV, TSV, Parquet, JSON or JSON lines.
        Without them held-out pairs alone decide.
    scorer
        The reward model that judges these images; one that did not pick the pairs.
    limit
        Images are made for this many of the prompts.
    """

    over: Annotated[tuple[str, ...], Option(commas=True)] = ("lr", "beta")
    budget: Count | Annotated[float, Field(gt=0, le=1)] = 0.2
    trials: Annotated[int, Field(ge=2, le=243)] = 9
    prompts: str | None = None
    scorer: str | None = None
    limit: Count = 64
    train: Train = Train()
    images: Generate = Generate()
