"""Networks of diffusers and transformers, loaded with all their weights or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.hub import weight_files
from fifa.models.optional import require
from fifa.models.runtime import out_of_memory
from fifa.shards.files import read_json

LIBRARIES = ("diffusers", "transformers")
# Of older checkpoints: what is no weight, and computed today
COMPUTED = ("position_ids", "inv_freq", "masked_bias")
NAMED = 3  # keys of each kind in a message


def load_network(network: Any, folder: Path, dtype: Any, **options: Any) -> Any:
    """A network from a local folder's safetensors, in half precision where there is nothing else.

    Parameters
    ----------
    network
        Its class, of diffusers or transformers.
    folder
        Config and weights.
    dtype
        The torch dtype of its weights, or ``auto``.
    options
        For its ``from_pretrained``.

    Raises
    ------
    FifaError
        Where weights are missing, or left over that belong into it. The library's own errors
        come as they are.
    """
    files = weight_files(folder)
    if not files.paths:
        raise FifaError(
            "no safetensors weights here (pickled ones are never opened)",
            where=str(folder),
            do="convert it with its save_pretrained, or download the model again",
        )
    loaded, found = network.from_pretrained(
        folder,
        dtype=dtype,
        variant=files.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    check_keys(loaded, found, folder)
    return loaded


def weights_in(paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Name, and shape and type, of all weights in safetensors files: only headers are read.

    Raises `FifaError` for a file that is damaged.
    """
    safetensors = require("safetensors", "train")
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield from ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - no dict
        except (OSError, safetensors.SafetensorError) as error:
            raise FifaError(f"not a safetensors file: {error}", where=str(path)) from error


def check_keys(network: Any, found: Mapping[str, Iterable[str]], folder: Path) -> None:
    """Raise `FifaError` unless the file's weights are those that ``network`` has.

    A pooler may be missing, for nothing here reads one; the library fills it at random. Of a
    language or vision model, weights of other heads and towers may be left over.

    Parameters
    ----------
    network
        As it was loaded.
    found
        Of its library's ``output_loading_info``: ``missing_keys`` and ``unexpected_keys``.
    folder
        For the message.
    """
    missing = [key for key in found["missing_keys"] if "pooler" not in key]
    whole = type(network).__module__.startswith("diffusers")
    parts = {name for name, _ in network.named_children()}
    # of a checkpoint with a head, the body's names begin with it
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    unused = [
        key
        for key in found["unexpected_keys"]
        if (whole or key.removeprefix(prefix).partition(".")[0] in parts)
        and not key.endswith(COMPUTED)
    ]
    if missing or unused:
        raise FifaError(
            "the weights are not those of the network: "
            + named_keys(missing=missing, unused=unused),
            where=str(folder),
            do="download the model again, or take the config.json that belongs to its weights",
        )


def load_parts(folder: Path, dtype: Any, but: Iterable[str] = ()) -> dict[str, Any]:
    """The networks of a pipeline's folder by their names, for its ``from_pretrained``.

    Which they are says its ``model_index.json``; a class that is no network of `LIBRARIES` is left
    to the pipeline.

    Parameters
    ----------
    folder
        In diffusers' layout.
    dtype
        The torch dtype of their weights.
    but
        Names of parts that are not wanted.

    Raises
    ------
    FifaError
        As `load_network`.
    """
    index = read_json(folder / "model_index.json", "the pipeline's index")
    bases = tuple(
        getattr(require(library, "train"), base)
        for library, base in zip(LIBRARIES, ("ModelMixin", "PreTrainedModel"), strict=True)
    )
    parts = {}
    for name, entry in index.items():
        if name in but or not isinstance(entry, list) or len(entry) != 2:
            continue
        library, class_name = entry
        if library not in LIBRARIES or not isinstance(class_name, str):
            continue
        network = getattr(require(library, "train"), class_name, None)
        if isinstance(network, type) and issubclass(network, bases):
            parts[name] = load_network(network, folder / name, dtype)
    return parts


def named_keys(**kinds: Iterable[str]) -> str:
    """``3 missing (a, b, ...); 1 unused (c)``; kinds without keys are left out."""
    texts = []
    for kind, found in kinds.items():
        keys = sorted(found)
        if keys:
            dots = ", ..." if len(keys) > NAMED else ""
            texts.append(f"{len(keys):,} {kind} ({', '.join(keys[:NAMED])}{dots})")
    return "; ".join(texts)


@contextmanager
def loading(what: str, where: Path, do: str | None = None) -> Iterator[None]:
    """Whatever a library raises for files that are not as they should be, as a `FifaError`.

    Memory that runs out is not the files' fault, and comes as it is.
    """
    with working(f"cannot load {what}", where, do):
        yield


@contextmanager
def working(failure: str, where: Path, do: str | None = None) -> Iterator[None]:
    """Whatever a library raises for networks or settings that do not fit, as a `FifaError`.

    ``failure`` says what then went wrong. Memory that runs out comes as it is.
    """
    try:
        yield
    except FifaError:
        raise
    except Exception as error:  # diffusers', transformers', torch's, tokenizers' and safetensors'
        if out_of_memory(error):
            raise
        brief = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise FifaError(f"{failure}: {brief}", where=str(where), do=do) from error
