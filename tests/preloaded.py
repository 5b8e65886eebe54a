"""What a process of ``forked.py`` begins with: all that it would otherwise load at its start."""

import gc
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import fifa

gc.disable()
inner = [module.name for module in walk_packages(fifa.__path__, "fifa.")]
inner.remove("fifa.__main__")
for name in (*inner, "accelerate", "peft", "pyarrow.dataset", "pytest", "rich.progress"):
    import_module(name)
sys.path.append(str(Path(__file__).parent / "training"))
import_module("tiny_diffusion"), import_module("trainings")  # diffusers loads classes when asked
# transformers makes a table of names at the first model that is loaded, for a quarter of a second
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
gc.freeze()  # what is loaded stays: a copy need not look through it
gc.enable()
