import signal
import sys

import pytest

from fifa.cli import main
from forked import die_at, finish, start
from kill import contents, kill_and_resume

# Every file of a run, in the order in which they get their places
FILES = ["run.json", "recipe.yaml", "prompts.parquet", "rejected.parquet", "pairs.parquet"]
FILES += [r"scores/margin-.*", r"scores/quality-.*", "scores.json", "checked.parquet"]
FILES += ["unreadable.parquet", "selection.parquet", r"README\.md", "subset", "report.html"]


@pytest.fixture
def options(shipped):
    options = [str(shipped), "--margin", "column:clipscore_0,clipscore_1", "--keep", "0.2"]
    return [*options, "--quality", "column:proxy_0", "--diversity", "none"]


def run(options, out, *death):
    if death:
        die_at(*death)
    sys.argv = ["fifa", "filter", *options, "--out", str(out)]
    main()


def test_killed_before_each_of_its_files_a_run_ends_with_the_same_bytes(options, memory):
    finish(start(run, options, memory / "unbroken"))
    expected = contents(memory / "unbroken")
    for number, file in enumerate(FILES):
        again_and_again, once = memory / "chain", memory / f"killed-{number}"
        finish(start(run, options, again_and_again, "os.rename", f"/{file}"), -signal.SIGKILL)
        if number % 6 == 1:
            finish(start(run, options, once, "os.rename", f"/{file}"), -signal.SIGKILL)
            finish(start(run, options, once))
            assert contents(once) == expected
    finish(start(run, options, again_and_again))
    assert contents(again_and_again) == expected


def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(options, memory):
    [(_, differ)] = kill_and_resume(options, memory, kills=1)
    assert differ == []
