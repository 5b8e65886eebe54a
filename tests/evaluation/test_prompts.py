import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.data.ids import prompt_id
from fifa.errors import FifaError
from fifa.evaluation.prompts import LONGEST, draw_seeds, read_prompts


def rows(prompts):
    return [(row["prompt"], row["category"]) for row in prompts.table.to_pylist()]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_prompt_a_line(tmp_path):
    text = "a cat\r\n\n  \na dog \nA  Cat\n" + "x" * (LONGEST + 1) + "\n\xfcber\n".encode().decode()
    prompts = read_prompts(write(tmp_path / "p.txt", text))
    assert rows(prompts) == [("a cat", None), ("a dog", None), ("über", None)]
    assert prompts.dropped == {
        "an empty prompt": 2,
        "a repeat of an earlier prompt": 1,
        f"longer than {LONGEST:,} characters": 1,
    }
    assert prompts.rows == len(prompts) + sum(prompts.dropped.values())
    assert prompts.table["prompt_id"].to_pylist() == [prompt_id(p) for p, _ in rows(prompts)]


def test_lines_that_are_no_text_are_counted(tmp_path):
    prompts = read_prompts(write(tmp_path / "p.txt", b"\xef\xbb\xbfa cat\n\xff\xfe\na dog"))
    assert rows(prompts) == [("a cat", None), ("a dog", None)]
    assert prompts.dropped == {"no UTF-8": 1}


def test_parti_prompts(tmp_path):
    text = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tB-1\n"
    text += '"a ""big"" cat"\tAnimals\tBasic\t\n\tAnimals\tBasic\t\n'
    prompts = read_prompts(write(tmp_path / "PartiPrompts.tsv", text))
    assert rows(prompts) == [("bond", "Abstract"), ('a "big" cat', "Animals")]
    assert prompts.dropped == {"an empty prompt": 1}


def test_geneval(tmp_path):
    lines = [
        '{"tag": "single_object", "include": [{"class": "bench"}], "prompt": "a photo of a bench"}',
        '{"tag": "colors", "include": [], "prompt": "a photo of a red bench"}',
        '{"tag": "colors", "incl',
        '"just text"',
        '{"tag": "colors", "include": []}',
        '{"prompt": 7}',
    ]
    prompts = read_prompts(write(tmp_path / "evaluation_metadata.jsonl", "\n".join(lines)))
    assert rows(prompts) == [
        ("a photo of a bench", "single_object"),
        ("a photo of a red bench", "colors"),
        ("just text", None),
    ]
    assert prompts.dropped == {"no JSON": 1, "no prompt": 1, "the prompt is no text": 1}


def test_hps_benchmark(tmp_path):
    write(tmp_path / "anime.json", json.dumps(["a girl", "a robot"]))
    write(tmp_path / "photo.json", json.dumps(["a street", "A robot"]))
    (tmp_path / "README.md").write_text("not prompts")
    prompts = read_prompts(tmp_path)
    assert rows(prompts) == [("a girl", "anime"), ("a robot", "anime"), ("a street", "photo")]
    by_category = {"anime": ["a girl"], "photo": ["a street", {"prompt": "a lamp"}]}
    file = write(tmp_path / "all.json", json.dumps(by_category))
    assert rows(read_prompts(file)) == [
        ("a girl", "anime"),
        ("a street", "photo"),
        ("a lamp", "photo"),
    ]
    assert rows(read_prompts(tmp_path / "photo.json")) == [("a street", None), ("A robot", None)]


def test_hpdv2_test_json(real_data):
    prompts = read_prompts(real_data / "hpdv2_gallery" / "test.json")
    entries = json.loads((real_data / "hpdv2_gallery" / "test.json").read_text())
    assert prompts.rows == len(entries) == 29
    assert prompts.table["prompt"][0].as_py() == entries[0]["prompt"]


def test_parquet_and_csv(tmp_path):
    table = pa.table({"caption": ["a cat", None, "a dog"], "jpg_0": [b"", b"", b""]})
    pq.write_table(table, tmp_path / "p.parquet")
    prompts = read_prompts(tmp_path / "p.parquet")
    assert rows(prompts) == [("a cat", None), ("a dog", None)]
    assert prompts.dropped == {"no prompt": 1}
    file = write(tmp_path / "p.csv", 'id,Prompt,Style\n1,"a cat, sitting",ink\n2,a dog,\n')
    assert rows(read_prompts(file)) == [("a cat, sitting", "ink"), ("a dog", None)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.csv", "id,words\n1,a cat\n", "id, words"),
        ("p.txt", "\n\x00 \n", "an empty prompt"),
        ("p.txt", "", "empty"),
        ("p.json", "[", "cannot read"),
        ("p.json", '{"a": 1}', "neither a list"),
        ("p.json", "[" * 100_000, "cannot read"),
        ("p.docx", "a cat", "are not read"),
    ],
)
def test_files_without_prompts(tmp_path, name, text, told):
    with pytest.raises(FifaError, match=told):
        read_prompts(write(tmp_path / name, text))


def test_a_parquet_without_prompts_names_its_columns(tmp_path):
    pq.write_table(pa.table({"words": ["a cat"]}), tmp_path / "p.parquet")
    with pytest.raises(FifaError, match="words"):
        read_prompts(tmp_path / "p.parquet")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FifaError, match="cannot open"):
        read_prompts(tmp_path / "p.txt")


def test_a_limit_takes_from_every_category_in_turn(tmp_path):
    entries = [{"prompt": f"{name} {i}", "category": name} for name in "aab" for i in range(9)]
    entries = [{"prompt": "z", "category": "z"}, *entries]
    prompts = read_prompts(write(tmp_path / "p.json", json.dumps(entries)), limit=5)
    assert rows(prompts) == [("z", "z"), ("a 0", "a"), ("a 1", "a"), ("b 0", "b"), ("b 1", "b")]
    assert prompts.rows == len(prompts) + sum(prompts.dropped.values())
    assert prompts.dropped["beyond the limit"] == 19 - 5


def test_seeds_are_a_prompts_own():
    first, second = draw_seeds("a", 4), draw_seeds("b", 4)
    assert len({*first, *second}) == 8
    assert draw_seeds("a", 2, first=2) == first[2:]
    assert all(0 <= seed < 2**32 for seed in first)


def test_a_quote_in_a_tsv_swallows_no_line(tmp_path):
    lines = ["Prompt\tCategory", '"a sign\tArts', "a fox\tAnimals", 'the "sea\tWorld']
    lines += ['"a ""quoted"" word"\tArts', '"A" and "B"\tArts', 'a dog"\tAnimals', "", "a cat"]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(lines))
    assert rows(read_prompts(path)) == [
        ('"a sign', "Arts"),
        ("a fox", "Animals"),
        ('the "sea', "World"),
        ('a "quoted" word', "Arts"),
        ('"A" and "B"', "Arts"),
        ('a dog"', "Animals"),
        ("a cat", None),
    ]


def test_a_quote_that_a_csv_never_closes_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt\n"a sign\na fox\na dog\n')
    with pytest.raises(FifaError, match="unexpected end of data"):
        read_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl"])
def test_prompts_in_other_encodings(tmp_path, encoding, suffix):
    text = {
        ".txt": "a café\nthe sea",
        ".json": '["a café", "the sea"]',
        ".jsonl": '{"prompt": "a café"}\n{"prompt": "the sea"}',
    }.get(suffix, "prompt\na café\nthe sea\n")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(text.encode(encoding))
    assert read_prompts(path).table["prompt"].to_pylist() == ["a café", "the sea"]


def test_a_name_that_no_file_can_have_is_told():
    with pytest.raises(FifaError, match="cannot read the prompts: File name too long"):
        read_prompts("a" * 5000)
