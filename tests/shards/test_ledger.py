import pyarrow as pa
import pytest

from fifa.shards.ledger import forget, map_shards


def squares(numbers):
    return pa.table({"square": [n * n for n in numbers]})


SHARDS = [("a", [1, 2]), ("b", [3]), ("c", [4, 5])]


def test_shards_are_joined_in_their_order():
    assert map_shards(squares, SHARDS, None)["square"].to_pylist() == [1, 4, 9, 16, 25]


def test_a_stopped_run_goes_on_and_does_no_shard_twice(tmp_path):
    asked = []

    def fragile(numbers):
        asked.append(numbers)
        if numbers == [4, 5] and len(asked) == 3:
            raise KeyboardInterrupt
        return squares(numbers)

    with pytest.raises(KeyboardInterrupt):
        map_shards(fragile, SHARDS, tmp_path / "parts")
    again = map_shards(fragile, SHARDS, tmp_path / "parts")
    assert again == map_shards(squares, SHARDS, None)
    assert asked == [[1, 2], [3], [4, 5], [4, 5]]


def test_progress_counts_rows_and_forgetting_removes_the_parts(tmp_path):
    rows = []
    map_shards(squares, SHARDS, tmp_path / "parts", done=rows.append)
    assert rows == [2, 1, 2]
    forget(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
