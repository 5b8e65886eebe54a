"""The cache of answers: a damaged one is told or asked again, never believed."""

from contextlib import closing

import numpy as np
import pytest

from fifa.errors import FifaError
from fifa.scoring.endpoint import ANSWERS, Answers

RIGHT = {f"key-{i}": f'{{"clarity": {i % 5 + 1}}}' for i in range(40)}


def test_a_changed_answer_is_not_known_and_a_broken_file_is_told(tmp_path):
    with closing(Answers(tmp_path)) as answers:
        for key, answer in RIGHT.items():
            answers.put(key, "model", answer)
    path = tmp_path / ANSWERS
    data, rng = path.read_bytes(), np.random.default_rng(0)
    verdicts = set()
    for _ in range(150):
        place, mask = int(rng.integers(len(data))), int(rng.integers(1, 256))
        rest = data[place + 1 :] if rng.integers(4) else b""
        path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + rest)
        try:
            with closing(Answers(tmp_path)) as answers:
                found = answers.get(list(RIGHT))
        except FifaError as error:
            assert error.where == str(path)
            verdicts.add("told")
        else:
            assert found.items() <= RIGHT.items()
            verdicts.add("same" if found == RIGHT else "asked again")
        for extra in tmp_path.glob(f"{ANSWERS}-*"):
            extra.unlink()
    assert verdicts == {"told", "same", "asked again"}


def test_what_was_changed_is_counted(tmp_path, capsys):
    with closing(Answers(tmp_path)) as answers:
        answers.put("a", "model", "1")
        answers.put("b", "model", "2")
        answers.base.execute("UPDATE rated SET answer = '3' WHERE key = 'a'")
        assert answers.get(["a", "b"]) == {"b": "2"}
    assert "1 answers are asked for again" in capsys.readouterr().err
    (tmp_path / ANSWERS).write_bytes(b"no database" * 100)
    with pytest.raises(FifaError, match="delete the file"):
        Answers(tmp_path)
