"""Where the images of a file's rows are: in its cells, in its tar members, at paths or URLs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.columns import Columns, Text
from fifa.data.records import tar_ref


def is_cell(columns: Columns, name: str) -> bool:
    """True if the column has image bytes, or images as base64, in at least one row."""
    return columns.image(name) != "text" and columns.holds_bytes(name)


def leaf_of(columns: Columns, name: str) -> str | None:
    """What may be read of an image column: all of a text, the path of a struct, no bytes."""
    kind = columns.image(name)
    if kind == "text":
        return name
    return f"{name}.path" if kind == "struct" else None


def keys_and_refs(
    columns: Columns,
    cell: bool,
    key: str | None,
    image: str | None,
    link: str | None,
    *,
    paths_are_ids: bool,
) -> tuple[Text, Text]:
    """Keys and references of one side's images.

    The key is the image's id if there is one, else its path or URL, else ``file#row:column``.
    The path in a cell that also has the bytes is a key only if it is a URL, or if the format
    vouches for it and it names a folder: `datasets` keeps the last part of the path there, and
    ``0001.jpg`` or ``tmp/left.png`` is many images' name.
    """
    nothing = pa.nulls(len(columns.rows), pa.string())
    leaf = leaf_of(columns, image) if image else None
    path = columns.reference(leaf) if leaf else nothing
    if cell and image and columns.image(image) == "written":
        path = columns.paths_among(image)
    if cell and image:
        place = pc.binary_join_element_wise(
            f"{columns.file}#", pa.array(columns.rows).cast(pa.string()), f":{image}", ""
        )
        named = pc.fill_null(pc.match_substring(path, "/" if paths_are_ids else "://"), False)
        lacks = columns.lacks_bytes(image) if leaf else np.asarray(path.is_valid())
        bare = pa.array(lacks & np.asarray(path.is_valid()))  # only a path, among rows with bytes
        ref = pc.if_else(bare, path, nothing)
        found = pc.if_else(pc.or_(named, bare), path, place)
    else:
        ref = path if leaf else (columns.reference(link) if link else nothing)
        found = _keys(columns, ref)
    return (columns.text(key) if key else found), ref


def _keys(columns: Columns, refs: Text) -> Text:
    """References as keys: ``FILE#NAME`` for what is in the file; in a tar nothing else counts."""
    if columns.kind != "tar" and not pc.any(pc.starts_with(refs, "tar:")).as_py():
        return refs
    texts = refs.to_pylist()
    places = [tar_ref(ref or "") for ref in texts]
    named = [
        f"{columns.file}#{place.name}" if place else None if columns.kind == "tar" else ref
        for ref, place in zip(texts, places, strict=True)
    ]
    return pa.array(named, pa.string())
