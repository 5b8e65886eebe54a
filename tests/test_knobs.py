"""Every knob stands once: its default, its help text, its option."""

import ast
import inspect
import re
from collections import Counter
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import click
import pytest
from click.testing import CliRunner

import fifa
from fifa import config
from fifa.cli import cli
from fifa.cli.options import KnobCommand, chosen, parameters
from fifa.config import (
    Evaluate,
    GeneratePairs,
    Knobs,
    Read,
    Recipe,
    Reward,
    Score,
    Select,
    Train,
    changed,
)
from fifa.errors import FifaError
from forked import finish, start, without_fifa

SOURCE = Path(fifa.__file__).parent
CLASSES = [one for one in vars(config).values() if isinstance(one, type) and one is not Knobs]
CLASSES = [one for one in CLASSES if issubclass(one, Knobs)]
# The same name and value, and yet another thing, or below `fifa.config`
ALLOWED = {
    ("data/parquet.py", "BATCH"): "rows of a file's cells in memory, not images in a forward pass",
    ("shards/ray.py", "num_cpus"): "the pool stands alone: packages below config import none of it",
}
PLACES = {("compare", "out"), ("demo", "out")}  # where results go if no folder is named


def commands(group=cli, name=""):
    for key, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{key} ")
        else:
            yield name + key, command


COMMANDS = dict(commands())
WITH_KNOBS = {name: one for name, one in COMMANDS.items() if isinstance(one, KnobCommand)}


def options_of(command):
    return {one.name: one for one in command.get_params(click.Context(command))}


def test_every_knob_has_a_help_text_and_an_option():
    for cls in CLASSES:
        names = [field.name for field in fields(cls) if not is_dataclass(field.default)]
        made = {one.name: one for one in parameters(cls)}
        assert list(made) == names
        options = [one for one in made.values() if isinstance(one, click.Option)]
        assert all(len(one.help) > 10 for one in options), cls


def test_no_help_text_stands_twice():
    found = re.findall(
        r"^    (\w+)\n((?:        .+\n)+)",
        "".join(path.read_text("utf-8") for path in (SOURCE / "config").glob("*.py")),
        re.MULTILINE,
    )
    texts = Counter((name, " ".join(text.split())) for name, text in found)
    assert len(texts) > 200
    assert [text for text, times in texts.items() if times > 1] == []


def test_every_class_of_knobs_has_a_command():
    used = {command._knobs for command in WITH_KNOBS.values()}
    used |= {"Loop", "Study"}  # recipes of sections, whose options would share names
    inner = {part.__name__ for cls in CLASSES for part in config.sections(cls).values()}
    assert used | inner == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_has_a_default_of_its_own(name):
    for option in options_of(COMMANDS[name]).values():
        if isinstance(option, click.Option) and (name, option.name) not in PLACES:
            unset = option.default in (None, False) or "UNSET" in repr(option.default)
            assert unset, (name, option.name)


def test_no_default_stands_twice_in_the_source():
    defaults: dict[str, list[object]] = {}
    for cls in CLASSES:
        for field in fields(cls):
            plain = field.default not in (MISSING, None, "", (), False)
            if plain and not is_dataclass(field.default):
                defaults.setdefault(field.name, []).append(field.default)
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent != SOURCE / "config":
            for name, node in values_by_name(ast.parse(path.read_text("utf-8"))):
                if constant(node) in defaults.get(name.lower(), ()):
                    found.add((path.relative_to(SOURCE).as_posix(), name))
    assert found == set(ALLOWED)


def values_by_name(tree):
    """Parameters and names that are set to something, with what they are set to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            names = [*given.posonlyargs, *given.args]
            pairs = zip(names[::-1], given.defaults[::-1], strict=False)
            for one, value in [*pairs, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
                yield one.arg, value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def constant(node):
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


@pytest.mark.parametrize("name", WITH_KNOBS)
def test_every_default_is_shown_by_help(name):
    command, options = WITH_KNOBS[name], options_of(WITH_KNOBS[name])
    cls = getattr(config, command._knobs)
    inner = config.sections(cls)
    for part in (cls, *(inner[section] for section in command._sections or inner)):
        for field in fields(part):
            option = options.get(field.name)
            plain = field.default not in (MISSING, None, "", (), (None, None))
            if plain and not is_dataclass(field.default) and isinstance(option, click.Option):
                assert "[default: " in option.help, field.name


@pytest.mark.parametrize("name", WITH_KNOBS)
def test_a_recipe_is_read_by_every_command_that_has_knobs(name, tmp_path):
    options = options_of(WITH_KNOBS[name])
    assert "recipe" in options
    cls = getattr(config, WITH_KNOBS[name]._knobs)
    given = {"seed": 7, "curve": 3, "base": "b", "source": "s", "model": "m", "prompts": "p"}
    given |= {"to": "trl", "judge": "vlm:m"}
    given = {name: value for name, value in given.items() if name in options and name != "prompts"}
    if cls is Evaluate:
        given |= {"tuned": {"t": "x"}, "prompts": "p"}
    if cls is GeneratePairs:
        given |= {"margin": ("pickscore",), "prompts": "p"}
    knobs = changed(cls(), **given)
    (tmp_path / "knobs.yaml").write_text(knobs.to_yaml(), "utf-8")
    if name != "select":  # whose source is the run's
        assert chosen(cls(), {"recipe": tmp_path / "knobs.yaml"}) == knobs
        assert knobs != cls()


def test_what_is_required_may_stand_in_the_recipe(tmp_path):
    (tmp_path / "knobs.yaml").write_text("model: m", "utf-8")
    with pytest.raises(FifaError, match="no source given"):
        chosen(Train(), {"recipe": tmp_path / "knobs.yaml"})
    train = chosen(Train(), {"recipe": tmp_path / "knobs.yaml", "source": "s"})
    assert (train.source, train.model) == ("s", "m")
    with pytest.raises(FifaError, match=r"no tuned given(.|\n)*--tuned"):
        chosen(Evaluate(), {"recipe": None, "base": "b"})


def test_select_takes_its_section_from_a_recipe(tmp_path):
    (tmp_path / "knobs.yaml").write_text("select: {keep: 7}\nscore: {k: 3}", "utf-8")
    run = Recipe(read=Read(source="s"), score=Score(k=4), select=Select(alpha=0.1))
    found = chosen(run, {"recipe": tmp_path / "knobs.yaml", "gamma": 0.2}, only=("select",))
    assert found == changed(run, select={"keep": 7, "alpha": 0.5, "gamma": 0.2})


def test_epochs_take_the_place_of_steps():
    assert changed(Train(steps=5), epochs=2.0).steps is None
    assert changed(Reward(), steps=600, device=None).steps == 600


def test_a_mistake_names_the_knob_and_what_was_given():
    with pytest.raises(FifaError, match=r"keep.*not -3"):
        Select(keep=-3)
    done = CliRunner().invoke(cli, ["train", "s", "--out", "o", "--loss", "orpo"])
    assert done.exit_code == 2
    assert "'orpo' is not one of 'sigmoid'" in done.output


NONSENSE = ("-1", "nan", "inf", "1e400", "9" * 401, "9" * 5000, "", "x", "0x10", "a" * 5000)
REQUIRED = {
    "evaluate": ["--base", "no", "--tuned", "no", "--prompts", "no", "--score", "none"],
    "train": ["no", "--model", "no"],
}


@pytest.mark.parametrize("name", sorted(set(WITH_KNOBS) - {"demo"}))
def test_nonsense_ends_in_words(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    required = [*name.split(), *REQUIRED.get(name, ["no"])]
    options = options_of(WITH_KNOBS[name])
    out = ["--out", "out"] if "out" in options else []
    given = [one for one in options.values() if isinstance(one, click.Option) and not one.is_flag]
    for number, option in enumerate(one for one in given if one.name not in ("help", "out")):
        for value in (NONSENSE[number % 10], NONSENSE[(3 * number + 5) % 10]):
            done = CliRunner().invoke(cli, [*required, *out, option.opts[0], value])
            assert isinstance(done.exception, FifaError | SystemExit), (option.name, value)
            assert getattr(done.exception, "code", 2) == 2, (option.name, value)


def load_all(order):
    fifa = without_fifa()
    names = order(one.name for one in iter_modules(fifa.__path__) if one.name != "__main__")
    for name in names:
        import_module(f"fifa.{name}")
    for name in fifa.__all__:
        assert not inspect.ismodule(getattr(fifa, name)), name
    assert not set(names) & set(fifa.__all__)


def backwards(names):
    return sorted(names, reverse=True)


@pytest.mark.parametrize("order", [sorted, backwards])
def test_no_module_hides_a_public_name(order):
    finish(start(load_all, order))
