"""Any order of commands, kills and lost files ends in the bytes of a fresh run, or a refusal."""

import contextlib
import hashlib
import shutil
import tempfile
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fifa.cli import cli
from fifa.config import Recipe
from fifa.errors import FifaError
from fifa.moji.family import FEEDBACK
from fifa.shards import files

MARGINS = ("column:clipscore_0,clipscore_1", "column:proxy_0,proxy_1")
LIGHT = ("--quality", "none", "--diversity", "none")
# What the pairs themselves are: whoever deletes these may be refused, and told why.
PAIRS = {"pairs.parquet", "prompts.parquet", "rejected.parquet", "origin.json", "recipe.yaml"}
select_knobs = st.tuples(
    st.sampled_from([["--keep", "3"], ["--keep", "0.5"]]),
    st.sampled_from([[], ["--strategy", "random"], ["--per-prompt", "1"]]),
).map(lambda knobs: [*knobs[0], *knobs[1]])


class Killed(BaseException):
    """The process is gone."""


def run(*arguments):
    """Run a command; what is wrong is None, or the message for a person."""
    try:
        cli(list(map(str, arguments)), standalone_mode=False)
    except (FifaError, click.ClickException) as error:
        assert str(error)
        return str(error)
    return None


def killed(write, *arguments):
    """Run a command that dies in its ``write``-th write, and leaves behind what it had begun."""
    left = write

    def sync(path):
        nonlocal left
        left -= 1
        if left == 0:  # from here on nothing is tidied up
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
            patch.setattr(files.shutil, "rmtree", lambda *a, **k: None)
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", sync)
        with contextlib.suppress(Killed):
            run(*arguments)


def content(folder):
    """The bytes of the selection and the subset."""
    paths = [folder / "selection.parquet", *sorted((folder / "subset").rglob("*"))]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


class RunFolder(RuleBasedStateMachine):
    """A run folder, and the recipe that its ``recipe.yaml`` names."""

    world: Path  # where all runs are
    source: Path
    fresh: dict[str, dict[str, str]]  # what a fresh run of a recipe gives, by its YAML

    @initialize()
    def begin(self):
        self.base = Path(tempfile.mkdtemp(dir=self.world))
        self.run = self.base / "run"
        self.lost = set()

    def teardown(self):
        if hasattr(self, "base"):
            try:
                self.check_end()
            finally:
                shutil.rmtree(self.base)

    @property
    def recipe(self):
        return self.run / "recipe.yaml"

    def commands(self, margin, knobs):
        scored = ("--margin", margin, *LIGHT)
        return {
            "filter": ("filter", self.source, *scored, *knobs, "--out", self.run),
            "read": ("read", self.source, "--out", self.run),
            "score": ("score", self.run, *scored),
            "select": ("select", self.run, *knobs),
            "export": ("export", self.run),
            "report": ("report", self.run),
        }

    @rule(
        name=st.sampled_from(["filter", "read", "score", "select", "export", "report"]),
        margin=st.sampled_from(MARGINS),
        knobs=select_knobs,
        write=st.one_of(st.none(), st.integers(1, 12)),
    )
    def command(self, name, margin, knobs, write):
        arguments = self.commands(margin, knobs)[name]
        if write is not None:
            killed(write, *arguments)
        elif run(*arguments) is None and name in ("filter", "export"):
            assert content(self.run) == self.expected()

    @precondition(lambda self: self.run.is_dir())
    @rule(data=st.data())
    def lose(self, data):
        there = sorted(path.relative_to(self.run) for path in self.run.rglob("*"))
        if there:
            gone = data.draw(st.sampled_from(there))
            path = self.run / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.lost.add(gone.as_posix())

    def expected(self):
        """What a fresh run of the folder's recipe gives."""
        recipe = self.recipe.read_text("utf-8")
        if recipe not in self.fresh:
            folder = self.world / f"fresh-{len(self.fresh)}"
            assert run("filter", "--recipe", self.recipe, "--out", folder) is None
            self.fresh[recipe] = content(folder)
        return self.fresh[recipe]

    def check_end(self):
        if not self.recipe.exists():
            return
        recipe = self.base / "final.yaml"
        shutil.copyfile(self.recipe, recipe)
        if Recipe.from_yaml(recipe).score == Recipe().score:
            return  # the default asks for models
        wrong = run("filter", "--recipe", recipe, "--out", self.run)
        if wrong is None:
            assert content(self.run) == self.expected()
        else:
            assert self.lost & PAIRS, wrong


def test_any_order_of_commands_ends_as_a_fresh_run(memory):
    RunFolder.world, RunFolder.source, RunFolder.fresh = memory, memory / "feedback.parquet", {}
    pq.write_table(pq.read_table(FEEDBACK).slice(0, 24), RunFolder.source)
    run_state_machine_as_test(
        RunFolder,
        settings=settings(
            max_examples=16,
            stateful_step_count=8,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert len(RunFolder.fresh) > 3
