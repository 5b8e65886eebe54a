"""Which images are the same: each is then decoded and embedded once.

The same image goes by several keys where a source names images by row or path, so images are told
apart by their bytes: a pass that reads every image and decodes none (`fifa.data.images.look`).
Where the key is an id of the image (Pick-a-Pic's uids) or reading is a download, the key is taken
at its word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.images import Images, Integers
from fifa.shards.files import column_digest


@dataclass(frozen=True)
class Distinct:
    """Every different image among some images.

    Parameters
    ----------
    contents
        What tells each apart (digest of its bytes, or its key), in order of first appearance,
        strings [distinct].
    first
        The row of the images where each appears first, int64 [distinct].
    of_image
        The different image behind every row of the images, int64 [images].
    """

    contents: pa.Array
    first: Integers
    of_image: Integers

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def identity(self) -> str:
        """Names the images and their order."""
        return column_digest(pa.chunked_array([self.contents]))


def tell_apart(images: Images, contents: pa.Array | None) -> Distinct:
    """The different ones among images: by ``contents`` (strings [images]), or by their keys.

    A null in ``contents`` (an image that could not be read) is an image of its own.
    """
    names = images.table["key"].combine_chunks()
    if contents is not None:
        names = pc.coalesce(contents.cast(pa.large_string()), names)
    encoded = names.dictionary_encode()
    of_image = encoded.indices.to_numpy().astype(np.int64)
    first = np.empty(len(encoded.dictionary), np.int64)
    first[of_image[::-1]] = np.arange(len(images))[::-1]  # written backwards: the earliest stays
    return Distinct(encoded.dictionary, first, of_image)
