"""Helpers of other folders' tests."""

import importlib.util
from pathlib import Path


def helper(folder, name):
    """The module ``tests/FOLDER/NAME.py``, under a name that no other helper has."""
    path = Path(__file__).parent / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
