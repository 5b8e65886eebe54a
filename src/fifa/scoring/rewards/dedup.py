"""What a data set asks of a reward model: each image once, each prompt once, each reward once.

The same image goes by several keys where a source names images by row or path, so images are told
apart by their bytes: a pass that reads every image and decodes none. Where the key is an id of
the image (Pick-a-Pic's uids) or reading is a download, the key is taken at its word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.images import has_pixels
from fifa.data.table import PROMPTS, Pairs
from fifa.shards.files import column_digest, digest

Integers = npt.NDArray[np.int64]

KEYED = frozenset({"pickapic"})  # formats whose image keys are ids of the images

# What `read_images` needs to find an image; prompts and labels stay at home.
PLACE = ["image_0", "image_1", "file", "row", "swapped", "image_0_ref", "image_1_ref"]


@dataclass(frozen=True)
class Keys:
    """The image keys of some pairs.

    Parameters
    ----------
    names
        The different keys in order of first appearance, strings [keys].
    first
        Where each appears first: 2 * row + side, int64 [keys].
    of_slot
        The key in every slot (2 * row + side), int64 [2 * pairs].
    """

    names: pa.Array
    first: Integers
    of_slot: Integers


@dataclass(frozen=True)
class Asked:
    """Every image, and every (image, prompt) that a reward is asked for.

    Parameters
    ----------
    images
        What tells each image apart (digest of its bytes, or its key), in order of first
        appearance, strings [images].
    first
        Where each image appears first: 2 * row + side, int64 [images].
    of_key
        The image behind every key, int64 [keys].
    image, prompt
        The image and the prompt (row of `Pairs.prompts`) of every ask, sorted, int64 [asks].
    of_slot
        The ask of every slot (2 * row + side), int64 [2 * pairs].
    """

    images: pa.Array
    first: Integers
    of_key: Integers
    image: Integers
    prompt: Integers
    of_slot: Integers

    @property
    def identity(self) -> str:
        """Names the images and their order."""
        return column_digest(pa.chunked_array([self.images]))

    def asks(self, start: int, stop: int) -> slice:
        """The asks of images ``start`` to ``stop``."""
        low, high = np.searchsorted(self.image, [start, stop])
        return slice(int(low), int(high))


def image_keys(pairs: Pairs) -> Keys:
    """The keys of all images in ``pairs``, each once."""
    n = len(pairs)
    columns = (pairs.table[f"image_{side}"] for side in (0, 1))
    # large: the keys of 100M pairs are more than the 2 GB that a plain string column can hold
    chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).dictionary_encode().unify_dictionaries()
    codes = np.concatenate([np.empty(0, np.int32), *(c.indices for c in encoded.chunks)])
    names = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.large_string())
    order, first, of_slot = _renumbered(codes.reshape(2, n).T.reshape(-1))
    return Keys(names.take(pa.array(order)), first, of_slot)


def ask(pairs: Pairs, keys: Keys, contents: pa.Array | None) -> Asked:
    """What the pairs ask for; ``contents`` (strings [keys]) tells images apart, or the keys do.

    A null in ``contents`` (an image that could not be read) is an image of its own.
    """
    n = len(pairs)
    images = keys.names
    if contents is not None:
        images = pc.coalesce(contents.cast(pa.large_string()), keys.names)
    encoded = images.dictionary_encode()
    # Keys are in order of first appearance, and so are the contents' codes.
    of_key = encoded.indices.to_numpy().astype(np.int64)
    first = np.empty(len(encoded.dictionary), np.int64)
    first[of_key[::-1]] = keys.first[::-1]  # written backwards: the earliest key's stays
    prompt = np.repeat(pairs.table["prompt_index"].to_numpy().astype(np.int64), 2)
    prompts = max(1, pairs.prompts.num_rows)
    both = of_key[keys.of_slot] * prompts + prompt if n else np.empty(0, np.int64)
    unique, of_slot = np.unique(both, return_inverse=True)
    return Asked(
        images=encoded.dictionary,
        first=first,
        of_key=of_key,
        image=unique // prompts,
        prompt=unique % prompts,
        of_slot=of_slot.astype(np.int64).reshape(-1),
    )


def trusted(pairs: Pairs) -> bool:
    """True where one key is one image, or where telling images apart would be a download."""
    return pairs.origin.format in KEYED or not has_pixels(pairs.table, pairs.origin)


def places(pairs: Pairs, slots: Integers) -> tuple[Pairs, list[int]]:
    """The pairs that the images in ``slots`` are in, and nothing else: small enough to travel.

    Returns
    -------
    pairs
        A row a slot, in their order; only what `fifa.data.images.read` reads. The
        reference to the side that was not asked for is gone.
    sides
        The side of each row's image.
    """
    rows, sides = slots // 2, slots % 2
    part = pairs.table.select(PLACE).take(pa.array(rows))
    columns = {name: part[name].combine_chunks() for name in PLACE}
    columns["file"] = columns["file"].cast(pa.string())
    for side in (0, 1):
        wanted = pa.array(sides == side)
        name = f"image_{side}_ref"
        columns[name] = pc.if_else(wanted, columns[name], pa.scalar(None, pa.string()))
    return Pairs(pa.table(columns), PROMPTS.empty_table(), origin=pairs.origin), sides.tolist()


def keys_identity(pairs: Pairs, keys: Keys) -> str:
    """Names the source as it was read, and its keys."""
    return digest(pairs.origin.fingerprint, column_digest(pa.chunked_array([keys.names])))


def _renumbered(codes: Integers) -> tuple[Integers, Integers, Integers]:
    """Codes in order of first appearance: the old code and the position of each, and all codes."""
    old, first = np.unique(codes, return_index=True)
    order = np.argsort(first)
    new = np.empty(len(old), np.int64)
    new[order] = np.arange(len(old))
    return old[order], first[order].astype(np.int64), new[codes]
