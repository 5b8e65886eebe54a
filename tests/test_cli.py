import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.shell_completion import BashComplete

from commands import fifa
from fifa.cli import cli, main
from fifa.errors import FifaError

MARGIN = ["--margin", "column:clipscore_0,clipscore_1"]
LIGHT = [*MARGIN, "--quality", "none", "--diversity", "none"]


def failed(*arguments):
    """What a command says that must fail as a person can read it."""
    done = fifa(*arguments)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def rows(shipped):
    """The shipped pairs without pixels: a small table to spoil."""
    return pq.read_table(shipped).drop_columns(["jpg_0", "jpg_1"])


def spoiled(tmp_path, table):
    pq.write_table(table, tmp_path / "source.parquet")
    return tmp_path / "source.parquet"


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def test_help_imports_no_heavy_library():
    heavy = "{'torch', 'pyarrow', 'transformers'}"
    code = f"import sys, fifa.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = (
        "import os, sys, fifa.cli; sys.argv[1:] = ['--help']; fifa.cli.main();"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "filter" in done.stdout
    assert done.stdout.endswith("passive False\n"), "torch reads it once, when it is loaded"


def test_the_core_works_without_torch(shipped, tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, faiss=None);"
        "from fifa.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "filter", str(shipped), *LIGHT, "--keep", "9"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kept 9 of" in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_a_missing_extra_is_told_with_the_command_that_installs_it(shipped, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from fifa.cli import main; main()"
    command = [sys.executable, "-c", code, "filter", str(shipped), *MARGIN]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "fifa-align[local]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA out of memory. Tried\nmore"), "CUDA out of memory"),
        (MemoryError(), "out"),
    ],
)
def test_out_of_memory_is_told_without_a_traceback(monkeypatch, capsys, error, says):
    def fails(**how):
        raise error

    monkeypatch.setattr("fifa.cli.cli", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert f"error: {says}" in told
    assert "--dtype" in told
    assert "Tried\nmore" not in told
    error = ValueError("a mistake of ours")
    with pytest.raises(ValueError, match="ours"):
        main()


def test_the_steps_give_what_filter_gives(shipped, tmp_path):
    whole, steps = tmp_path / "whole", tmp_path / "steps"
    assert fifa("filter", shipped, *LIGHT, "--keep", "0.2", "--out", whole).returncode == 0
    assert fifa("score", shipped, *LIGHT, "--out", steps).returncode == 0
    for command in (["select", steps, "--keep", "0.2"], ["export", steps], ["report", steps]):
        done = fifa(*command)
        assert done.returncode == 0, done.stderr
    for name in ("selection.parquet", "pairs.parquet", "recipe.yaml"):
        assert (whole / name).read_bytes() == (steps / name).read_bytes()


def test_selecting_again_needs_no_scorer(shipped, tmp_path):
    run = tmp_path / "run"
    assert fifa("filter", shipped, *LIGHT, "--keep", "20", "--out", run).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "scores").iterdir()}
    done = fifa("select", run, "--keep", "50", "--strategy", "random")
    assert done.returncode == 0, done.stderr
    assert "kept 50 of" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (run / "scores").iterdir()} == before
    there = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert "no generator is named" in failed("select", run, "--generators", "nobody", "--keep", "7")
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == there


def test_a_dry_run_writes_nothing(shipped, tmp_path):
    done = fifa("filter", shipped, *LIGHT, "--keep", "10%", "--dry-run", "--out", tmp_path / "run")
    assert "keep: 0.1" in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_empty_data_set(rows, tmp_path):
    source = spoiled(tmp_path, rows[:0])
    assert "the data set is empty" in failed("filter", source, *LIGHT, "--out", tmp_path / "run")


def test_a_missing_column_names_those_there_are(rows, tmp_path):
    source = spoiled(tmp_path, rows.drop_columns(["caption"]))
    message = failed("filter", source, *LIGHT, "--out", tmp_path / "run")
    assert "--columns" in message
    assert "label_0" in message


def test_a_missing_score_column_names_those_there_are(shipped, tmp_path):
    options = ["--margin", "column:pick_0,pick_1", "--quality", "none", "--diversity", "none"]
    message = failed("filter", shipped, *options, "--out", tmp_path / "run")
    assert "pick_0" in message
    assert "clipscore_0" in message


def test_all_ties(rows, tmp_path):
    half = [0.5] * rows.num_rows
    table = replaced(replaced(rows, "label_0", half), "label_1", half)
    message = failed("filter", spoiled(tmp_path, table), *LIGHT, "--out", tmp_path / "run")
    assert "tie" in message


def test_nan_and_infinite_scores_are_dropped_with_their_reason(rows, tmp_path):
    scores = rows["clipscore_0"].to_pylist()
    scores[:3] = [float("nan"), float("inf"), float("-inf")]
    source = spoiled(tmp_path, replaced(rows, "clipscore_0", scores))
    done = fifa("filter", source, *LIGHT, "--keep", "0.5", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "not_scored" in done.stderr


def test_more_asked_than_there_is(shipped, tmp_path):
    done = fifa("filter", shipped, *LIGHT, "--keep", "100000", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "100,000" in done.stderr


def test_a_huge_prompt_and_text_that_is_no_utf8_are_counted(rows, tmp_path):
    table = rows.select(
        ["caption", "image_0_uid", "image_1_uid", "label_0", "clipscore_0", "clipscore_1"]
    )
    prompts = table["caption"].to_pylist()
    prompts[0] = "x" * 10_000_000
    pyarrow.csv.write_csv(replaced(table, "caption", prompts), tmp_path / "source.csv")
    raw = (tmp_path / "source.csv").read_bytes().split(b"\n")
    raw[5] = raw[5].replace(b"a ", b"\xff\xfe ")
    (tmp_path / "source.csv").write_bytes(b"\n".join(raw))
    columns = "prompt=caption,image_0=image_0_uid,image_1=image_1_uid,label=label_0"
    run = tmp_path / "run"
    done = fifa("filter", tmp_path / "source.csv", "--columns", columns, *LIGHT, "--out", run)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(run / "rejected.parquet").num_rows == 2


def test_a_run_of_another_recipe_is_left_alone(shipped, tmp_path):
    run = tmp_path / "run"
    assert fifa("filter", shipped, *LIGHT, "--keep", "20", "--out", run).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = failed("filter", shipped, *LIGHT, "--keep", "30", "--out", run)
    assert "another recipe" in message
    assert "select.keep: 20 / 30" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_mistyped_name_can_be_mended_in_the_same_folder(shipped, tmp_path):
    run = tmp_path / "run"
    wrong = ["--margin", "column:sim_0,sim_1", "--quality", "none", "--diversity", "none"]
    assert "sim_0" in failed("filter", shipped, *wrong, "--keep", "9", "--out", run)
    done = fifa("filter", shipped, *LIGHT, "--keep", "9", "--out", run)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_no_run_is_left_alone(shipped, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in failed("filter", shipped, *LIGHT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written(shipped, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in failed("filter", shipped, *LIGHT, "--out", tmp_path / "file" / "run")


def test_an_endpoint_that_is_down(shipped, tmp_path):
    options = [*MARGIN, "--quality", "openai:any@http://127.0.0.1:9/v1", "--diversity", "none"]
    run = tmp_path / "run"
    assert "127.0.0.1:9" in failed("filter", shipped, *options, "--out", run)
    assert (run / "pairs.parquet").exists()


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan", "many", "101%"])
def test_a_keep_that_means_nothing(shipped, tmp_path, keep):
    message = failed("filter", shipped, *LIGHT, "--keep", keep, "--out", tmp_path / "run")
    assert "keep" in message
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_not_there(tmp_path):
    message = failed("filter", tmp_path / "nothing", *LIGHT, "--out", tmp_path / "run")
    assert "nothing" in message


def test_a_scorer_that_nobody_knows_is_told_before_anything_is_read(tmp_path):
    roles = {"margin": "reward model", "quality": "rater", "diversity": "encoder"}
    for option, role in roles.items():
        command = ("filter", tmp_path / "nothing", f"--{option}", "x", "--out", tmp_path / "run")
        assert f"no such {role}: x" in failed(*command)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_version_is_refused_by_every_command(shipped, tmp_path):
    run = tmp_path / "run"
    assert fifa("filter", shipped, *LIGHT, "--keep", "20", "--out", run).returncode == 0
    (run / "run.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (
        ["filter", shipped, *LIGHT, "--keep", "20", "--out", run],
        ["score", run],
        ["select", run],
        ["export", run],
        ["report", run],
        ["batch", "write", run, tmp_path / "file"],
        ["train", run, "--model", "m", "--out", tmp_path / "out"],
        ["compare", run],
        ["vote", run],
    ):
        with pytest.raises(FifaError, match="run the command again"):
            cli(list(map(str, command)), standalone_mode=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_selecting_and_scoring_take_their_sections_from_a_recipe(shipped, tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "mine.yaml"
    assert fifa("filter", shipped, *LIGHT, "--keep", "20", "--out", run).returncode == 0
    recipe.write_text("select: {keep: 30, strategy: random}")
    done = fifa("select", run, "--recipe", recipe, "--keep", "40")
    assert "kept 40 of" in done.stderr, done.stderr
    assert "strategy: random" in (run / "recipe.yaml").read_text()
    assert "column:clipscore_0" in (run / "recipe.yaml").read_text()


def test_a_run_reads_its_pairs_once(shipped, tmp_path):
    run = tmp_path / "run"
    assert fifa("read", shipped, "--out", run).returncode == 0
    assert "has read its pairs already" in failed("score", run, "--format", "pickapic")


def test_every_command_that_prints_a_result_prints_it_as_json(shipped, tmp_path):
    run = tmp_path / "run"
    done = fifa("filter", shipped, *LIGHT, "--keep", "20", "--out", run, "--json", "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["subset"] == str(run / "subset")
    facts = {step["step"]: step for step in found["steps"]}
    assert facts["select"]["selected"] == facts["export"]["subset_pairs"] == 20
    assert json.loads(fifa("read", shipped, "--explain", "--json").stdout)["format"] == "pickapic"
    for command in (["select", run, "--keep", "9"], ["export", run], ["report", run]):
        assert str(run) in next(iter(json.loads(fifa(*command, "--json").stdout).values()))
    failed = fifa("select", tmp_path, "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["error"]["what"] == "not a run folder"
    assert "error: not a run folder" in failed.stderr
    assert "Traceback" in fifa("select", tmp_path, "--verbose").stderr


def test_the_report_is_opened_or_said_where_it_is(shipped, tmp_path, monkeypatch):
    run, opened = tmp_path / "run", []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page) or True)
    wanted = ["filter", shipped, *LIGHT, "--keep", "20", "--out", run, "--open"]
    assert "report" not in fifa(*wanted, "--dry-run").stderr
    assert opened == []
    assert "no browser" not in fifa(*wanted).stderr
    assert opened == [(run / "report.html").as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda page: False)
    done = fifa("report", run, "--open")
    assert f"no browser was found here; open {run / 'report.html'}" in done.stderr
    assert done.returncode == 0


def test_a_shell_completes_commands_and_options(monkeypatch):
    script = fifa("completion", "bash").stdout
    assert "_FIFA_COMPLETE=bash_complete" in script
    for words, wanted in (("fifa do", "doctor"), ("fifa filter --ke", "--keep")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert wanted in BashComplete(cli, {}, "fifa", "_FIFA_COMPLETE").complete()
