"""What optional wheels bring: libraries, and model files inside them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fifa.errors import FifaError


def require(module: str, extra: str = "local", *, what: str = "this", do: str = "") -> Any:
    """The imported ``module``; `FifaError` with the pip command where it is not installed.

    Parameters
    ----------
    module
        Its name.
    extra
        The extra of this package that installs it.
    what
        What needs it, for the message.
    do
        What to do about it, where that is not to install the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise FifaError(
            f"{what} needs {module.partition('.')[0]}, which cannot be imported: {error}",
            do=do or f"pip install 'fifa-align[{extra}]'",
        ) from error


def wheel_path(module: str, inside: str) -> Path | None:
    """The path of ``inside`` in the installed package ``module``, which is not imported.

    None where the package is not installed or has no such file or folder.
    """
    found = find_spec(module)
    for root in (found.submodule_search_locations or ()) if found else ():
        path = Path(root) / inside
        if path.exists():
            return path
    return None
