import json

import pytest

from fifa.errors import FifaError
from fifa.shards.manifest import MANIFEST, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("weights", "part/a", "part/b"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    write_manifest(tmp_path, [tmp_path / "weights", tmp_path / "part"], {"last": b"last"})
    check_manifest(tmp_path)
    (tmp_path / "last").write_bytes(b"last")
    return tmp_path


def test_a_flipped_byte_or_a_truncated_half_is_told_by_name(folder):
    for name in ("weights", "part/a", "part/b", "last"):
        whole = (folder / name).read_bytes()
        flipped = bytes([*whole[:-1], whole[-1] ^ 1])
        for damaged in (flipped, whole[: len(whole) // 2], b""):
            (folder / name).write_bytes(damaged)
            with pytest.raises(FifaError, match=rf"not as it was written[\s\S]*{name}"):
                check_manifest(folder)
        (folder / name).write_bytes(whole)
    check_manifest(folder)


def test_only_what_is_asked_for_is_looked_at_and_what_is_gone_is_not_missed(folder):
    (folder / "weights").write_bytes(b"other")
    check_manifest(folder, "part")
    (folder / "weights").unlink()
    check_manifest(folder)


def test_the_digests_themselves_are_told_from_others(folder):
    text = (folder / MANIFEST).read_text()
    known = json.loads(text)
    known["files"]["weights"] = "0" * 32
    for damaged in (json.dumps(known), text.replace("part/b", "part/c"), text[:40], "[]"):
        (folder / MANIFEST).write_text(damaged)
        with pytest.raises(FifaError, match=MANIFEST):
            check_manifest(folder)
    (folder / MANIFEST).unlink()
    check_manifest(folder)
