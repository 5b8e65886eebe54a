"""The scripts in examples/ are run: bash writes down their commands, which run in this process.

Training and generating images takes seconds, so one script does it; of the others these commands
are parsed, with all their knobs.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from commands import fifa
from fifa import config
from fifa.cli import cli
from fifa.cli.options import KnobCommand, chosen
from fifa.moji.family import CLIP, SD

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = ("train", "evaluate", "convert", "doctor", "vote", "demo")
SHIM = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >>"$COMMANDS"; printf '\\n' >>"$COMMANDS"
"""


@pytest.fixture
def small(shipped, tmp_path, monkeypatch):
    """What examples/small.sh sets, and a `fifa` that writes down what it is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fifa").write_text(SHIM)
    (tmp_path / "bin" / "fifa").chmod(0o755)
    text = (EXAMPLES / "small.sh").read_text("utf-8")
    found = dict(re.findall(r"(\w+)=(\"[^\"]*\"|[^\s\"]+)", text.partition("world=")[2]))
    found = {name: value.strip('"') for name, value in found.items()}
    found |= {"SOURCE": str(shipped), "MODEL": str(SD), "SCORER": f"clipscore:{CLIP}"}
    (tmp_path / found["PROMPTS"]).write_text("cat on a blue background\nred apple\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, **found, "PATH": path, "COMMANDS": str(tmp_path / "commands")}


def commands_of(script, env):
    """The commands of a script, in order; bash checks its syntax and its variables."""
    Path(env["COMMANDS"]).write_bytes(b"")
    command = ["bash", *(["-c", script] if "\n" in str(script) else [str(script)])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = Path(env["COMMANDS"]).read_text("utf-8").splitlines()
    return [line.rstrip("\0").split("\0") for line in lines]


def parsed(words):
    """Refuse an option that there is not, or a value that it cannot have."""
    command = cli.commands[words[0]]
    words = words[1:]
    while isinstance(command, click.Group):
        name = words[0] if words[0] in command.commands else "serve"
        command, words = command.commands[name], words[words[0] == name :]
    if isinstance(command, KnobCommand):
        own = {one.name for one in click.Command.get_params(command, click.Context(command))}
        options = command.make_context("fifa", list(words)).params
        preset = options.get("preset")
        base = config.preset(preset) if preset else getattr(config, command._knobs)()
        own -= {"recipe"}
        given = {name: value for name, value in options.items() if name not in own}
        if given.get("tuned"):
            given["tuned"] = dict(one.split("=") for one in given["tuned"])
        chosen(base, given | ({"source": "the run's"} if command is cli.commands["select"] else {}))
    else:
        command.make_context("fifa", list(words))


def run(script, env, *, slow=False):
    commands = commands_of(script, env)
    for words in commands:
        if words[0] in SLOW and not slow:
            parsed(words)
        else:
            done = fifa(*words)
            assert done.returncode == 0, (words, done.stderr)
    return [words[0] for words in commands]


def test_pickapic_to_stable_diffusion(small, tmp_path):
    steps = run(EXAMPLES / "pickapic-sd15.sh", small, slow=True)
    assert steps == ["read", "trust", "filter", "info", "train", "train", "evaluate"]
    results = json.loads((tmp_path / "pickapic-sd15/run/evaluate/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "lora"]


def test_the_other_scripts(small, shipped, tmp_path):
    rows = pq.read_table(shipped).slice(0, 40).to_pylist()
    lines = ["text,left,right,better,clip_0,clip_1"]
    for number, row in enumerate(rows):
        for side in (0, 1):
            (tmp_path / f"{number}-{side}.jpg").write_bytes(row[f"jpg_{side}"])
        scores = f"{row['clipscore_0']},{row['clipscore_1']}"
        lines.append(f"{row['caption']},{number}-0.jpg,{number}-1.jpg,{row['label_0']},{scores}")
    (tmp_path / "votes.csv").write_text("\n".join(lines))
    votes = {"VOTES": "votes.csv", "MARGIN": "column:clip_0,clip_1"}
    votes["COLUMNS"] = "prompt=text,image_0=left,image_1=right,label=better"
    assert run(EXAMPLES / "own-votes.sh", small | votes) == ["read", "filter", "train"]
    made = {"VOTES": "no", "TUNED": "other=x"}
    words = [" ".join(one[:2]) for one in commands_of(EXAMPLES / "own-votes.sh", small | made)]
    assert words[1:4] == ["vote own-votes/images", "vote results", "vote export"]

    judged = {"JUDGE": "column:proxy_0,proxy_1", "BUDGET": "100%"}
    assert run(EXAMPLES / "hpdv3-judge.sh", small | judged) == ["trust", "filter", "trust"]
    run(EXAMPLES / "safety-first.sh", small)
    some = {"RUN": "safety-first/run", "BUDGETS": "5 9"}
    assert run(EXAMPLES / "budgets.sh", small | some)[-1] == "evaluate"
    kept = pq.read_table("budgets/9/selection.parquet")["status"].to_pylist()
    assert kept.count("selected") == 9
    margins = "column:clipscore_0,clipscore_1 column:proxy_0,proxy_1"
    run(EXAMPLES / "committee.sh", small | {"MARGINS": margins})
    for script in ("pickapic-sdxl", "slurm"):
        launch = {"LAUNCH": "fifa", "SCORE": "--executor ray --actors 4 --num-gpus 1"}
        for words in commands_of(EXAMPLES / f"{script}.sh", small | launch):
            parsed(words)
    sky = yaml.safe_load((EXAMPLES / "sky.yaml").read_text("utf-8"))
    for words in commands_of(sky["run"], small | sky["envs"] | {"SOURCE": "s", "BUCKET": "b"}):
        parsed(words)


def test_defaults_of_the_scripts_are_options(small):
    """Without the small world: what a person gets who sets nothing but the source."""
    bare = {"PATH": small["PATH"], "COMMANDS": small["COMMANDS"], "LAUNCH": "fifa"}
    bare |= {"SOURCE": "s", "MODEL": "m", "PROMPTS": "p", "RUN": "bin", "VOTES": "bin"}
    others = {EXAMPLES / "small.sh", EXAMPLES / "controls.sh"}
    for script in sorted({*EXAMPLES.glob("*.sh")} - others):
        for words in commands_of(script, bare):
            parsed(words)


def test_the_notebook(small):
    cells = json.loads((EXAMPLES / "moji.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for cell in code:
        if cell.startswith("!fifa "):
            parsed(cell.removeprefix("!fifa ").split())
    names: dict[str, object] = {}
    exec(next(cell for cell in code if "fifa.select" in cell).replace(".to_pandas()", ""), names)
    assert names["selection"]["status"].to_pylist().count("selected") == 150


def test_the_first_filter_of_the_readme(shipped, tmp_path):
    """On a table with the columns of the set that it names, and without the slow raters."""
    text = (EXAMPLES.parent / "README.md").read_text("utf-8").replace("\\\n", "")
    words = re.search(r"fifa filter (hf://\S+.*)", text)[1].split()
    parsed(["filter", *words])
    rows = [row for row in pq.read_table(shipped).to_pylist() if row["label_0"] != 0.5][:60]
    sides = [("1", "0") if row["label_0"] == 0 else ("0", "1") for row in rows]
    pairs = list(zip(rows, sides, strict=True))
    columns = {"prompt": [row["caption"] for row in rows], "category": ["x"] * len(rows)}
    for place, name in enumerate(("chosen", "rejected")):
        images = [{"bytes": row[f"jpg_{side[place]}"], "path": None} for row, side in pairs]
        columns |= {name: images, f"{name}_model": [f"m{side[place]}" for _, side in pairs]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    out = tmp_path / "run"
    words = [str(tmp_path / "set.parquet"), *words[1:-1], str(out)]
    done = fifa("filter", *words, "--quality", "none", "--diversity", "none", "--anyway")
    assert done.returncode == 0, done.stderr
    assert "as open-image-preferences: 60 pairs" in done.stderr
