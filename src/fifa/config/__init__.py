"""Every knob of every command, once: its default, its bounds, and its help text.

A command's knobs are a frozen dataclass, checked when it is made. The help text of a knob is its
entry in the docstring of its class, or of `fifa.config.knobs.Shared`; `fifa.cli.options` makes the
command line from both. `changed` replaces knobs, ``from_yaml`` and ``to_yaml`` read and write them
as files.
"""

from fifa.config.cluster import Cluster
from fifa.config.evaluate import (
    GENERATE_FILE,
    SAMPLERS,
    Convert,
    Evaluate,
    Generate,
    GeneratePairs,
    Measure,
    Vote,
)
from fifa.config.knobs import Knobs, Option, build, changed, sections
from fifa.config.loop import Demo, Loop
from fifa.config.plan import Plan
from fifa.config.reward import Reward, Rubric
from fifa.config.select import (
    RECIPE_FILE,
    STRATEGIES,
    UNSAFE_FLAGS,
    Compute,
    Export,
    Read,
    Recipe,
    Score,
    Select,
    Trust,
)
from fifa.config.study import Arm, Part, Study
from fifa.config.train import PRESETS, Train, lora_small, paper_sd15, paper_sdxl, preset
from fifa.config.tune import Tune

__all__ = [
    "GENERATE_FILE",
    "PRESETS",
    "RECIPE_FILE",
    "SAMPLERS",
    "STRATEGIES",
    "UNSAFE_FLAGS",
    "Arm",
    "Cluster",
    "Compute",
    "Convert",
    "Demo",
    "Evaluate",
    "Export",
    "Generate",
    "GeneratePairs",
    "Knobs",
    "Loop",
    "Measure",
    "Option",
    "Part",
    "Plan",
    "Read",
    "Recipe",
    "Reward",
    "Rubric",
    "Score",
    "Select",
    "Study",
    "Train",
    "Trust",
    "Tune",
    "Vote",
    "build",
    "changed",
    "lora_small",
    "paper_sd15",
    "paper_sdxl",
    "preset",
    "sections",
]
