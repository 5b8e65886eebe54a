"""The commands: each parses its options, calls one function of the library and prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fifa import __version__
from fifa.cli.options import PATH, RUN, KnobCommand, check_runs, chosen, out_option, run_argument
from fifa.cli.output import Answer, Command, Group, Place, answer, open_option
from fifa.errors import FifaError


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="fifa")
def cli() -> None:
    """Filter human feedback on generated images: keep the few pairs that are worth training on.

    A SOURCE is a file, a folder, a glob, an hf://datasets/... id or any fsspec URL. A RUN is the
    folder that `filter` or `evaluate` writes. A RUN, and what --out names, may be in an object
    store: s3://bucket/run, gs://bucket/run.
    """


@cli.command("filter", cls=KnobCommand, knobs="Recipe")
@out_option()
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done, then stop.")
@open_option
def filter_command(out: Path, dry_run: bool, **options: Any) -> Answer:
    """Keep the pairs that are worth training on.

    This is the main command: it reads SOURCE, scores every pair, keeps the best ones, and writes
    the subset and a report.
    """
    from fifa.config import Recipe
    from fifa.run.steps import filter_pairs, plan

    recipe = chosen(Recipe(), options)
    if dry_run:
        return answer(text := plan(recipe), recipe=asdict(recipe), plan=text.splitlines())
    run = filter_pairs(recipe, out)
    report = run.folder / "report.html"
    return answer(report, run=run.folder, subset=run.subset, report=report)


@cli.command("read", cls=KnobCommand, knobs="Recipe", sections=("read",))
@out_option("The run folder; --explain needs none.", required=False)
@click.option("--explain", is_flag=True, help="Print how SOURCE is understood, with three rows.")
def read_command(out: Path | None, explain: bool, **options: Any) -> Answer:
    """Read SOURCE into a table of pairs.

    No image is opened.
    """
    from fifa.config import Recipe
    from fifa.data.explain import explained, explained_facts
    from fifa.data.read import read_source
    from fifa.run.folder import start_run
    from fifa.run.steps import echo_read, read_step
    from fifa.shards.lock import only_writer

    recipe = chosen(Recipe(), options)
    if out is None:
        if not explain:
            raise FifaError("no --out given", do="name a run folder, or add --explain to look")
        pairs = read_source(recipe.read)
        return Answer(explained(pairs), explained_facts(pairs))
    with only_writer(out):
        pairs = read_step(start_run(out, recipe))
    echo_read(pairs)
    table = out / "pairs.parquet"
    told = explained(pairs) if explain else str(table)
    return Answer(told, {"table": table, **explained_facts(pairs)})


@cli.command(
    "score", cls=KnobCommand, knobs="Recipe", sections=("read", "score", "compute"), of_run=True
)
@out_option("The run folder of a new run.", required=False)
def score_command(out: Path | None, **options: Any) -> Answer:
    """Score every pair and every prompt.

    SOURCE is a data set (then --out names a new run folder), or a RUN that was read before.
    """
    from fifa.config import Recipe
    from fifa.run.folder import open_run, revised, start_run
    from fifa.run.steps import read_step, score_step
    from fifa.shards.lock import only_writer

    source = options.pop("source") if out is None else ""
    with only_writer(open_run(source or "").folder if out is None else out):
        if out is None:
            run = open_run(source or "")
            run = revised(run, chosen(run.recipe, options, only=("score", "compute")))
        else:
            run = start_run(out, chosen(Recipe(), options))
        score_step(run, read_step(run))
    return answer(run.scores, scores=run.scores)


@cli.command("select", cls=KnobCommand, knobs="Recipe", sections=("select",))
@run_argument
def select_command(run: str, **options: Any) -> Answer:
    """Select again from the scores of a run.

    Another number of pairs or other weights take seconds, because nothing is scored again.
    """
    from fifa.run.folder import open_run, revised, unless_refused
    from fifa.run.steps import select_step
    from fifa.shards.lock import only_writer

    with only_writer(open_run(run).folder), unless_refused(open_run(run).folder):
        opened = open_run(run)  # as nobody changes it any more
        select_step(revised(opened, chosen(opened.recipe, options, only=("select",))))
    table = opened.folder / "selection.parquet"
    return answer(table, selection=table)


@cli.command("trust", cls=KnobCommand, knobs="Trust", of_run=True)
@click.option(
    "--scores", type=Place(writes=True), help="A folder where scores are kept; RUN has its own."
)
def trust_command(scores: Path | None, **options: Any) -> Answer:
    """Tell whether a margin can be trusted on SOURCE.

    SOURCE is a data set or benchmark with people's labels, or a RUN that was read before. Each
    judge is measured on these labels: accuracy by margin, calibration, position bias, agreement
    with the other judges, accuracy by generator and category.
    """
    from fifa.config import Trust
    from fifa.reporting.trust import trust_text
    from fifa.run.trust import trust

    found = trust(chosen(Trust(), options), scores=scores)
    return Answer(trust_text(found), found.plain(), steps=False)


download_option = click.option(
    "--allow-download", is_flag=True, help="Fetch images that the source only names by a URL."
)


@cli.command("export", cls=KnobCommand, knobs="Export")
@run_argument
@out_option("The folder to write.  [default: RUN/subset, or RUN/subset-TO]", required=False)
@download_option
def export_command(run: str, out: Path | None, allow_download: bool, **options: Any) -> Answer:
    """Write the selected pairs for a trainer.

    The selected pairs of RUN become a data set that a trainer reads as it is.
    """
    from fifa.config import Export
    from fifa.run.folder import open_run
    from fifa.run.push import check_push, push
    from fifa.run.steps import export_step
    from fifa.shards.lock import only_writer

    knobs = chosen(Export(), options)
    if knobs.push_to_hub:
        check_push(knobs.push_to_hub)
    with only_writer(open_run(run).folder):
        folder = export_step(open_run(run), out, to=knobs.to, allow_download=allow_download)
        if not knobs.push_to_hub:
            return answer(folder, subset=folder)
        click.echo(folder, err=True)
        address = push(folder, knobs.push_to_hub, public=knobs.public)
        return answer(f"{folder}\n{address}", subset=folder, address=address)


@cli.command("push")
@click.argument("folder", type=PATH)
@click.argument("name")
@click.option(
    "--public", is_flag=True, help="Let everybody see it; a new one is private otherwise."
)
def push_command(folder: Path, name: str, public: bool) -> Answer:
    """Upload a subset or a checkpoint to the Hugging Face hub.

    FOLDER is what `export`, `train` or `reward train` wrote, NAME is the repository, ORG/NAME. It
    takes a token that may write, in HF_TOKEN or from `hf auth login`.
    """
    from fifa.run.push import push

    address = push(folder, name, public=public)
    return answer(address, address=address)


@cli.command("rebuild")
@click.argument("subset_json", type=PATH)
@click.option("--source", help="Where the source is now, if it has moved.")
@download_option
@out_option("The folder of the subset.")
def rebuild_command(
    subset_json: Path, source: str | None, allow_download: bool, out: Path
) -> Answer:
    """Rebuild a subset from its subset.json.

    The source is read again; nothing is scored.
    """
    from fifa.selection.export import rebuild

    made = rebuild(subset_json, out, source=source, allow_download=allow_download)
    return answer(out, **asdict(made))


@cli.command("report")
@run_argument
@open_option
def report_command(run: str) -> Answer:
    """Write the report of a run again.

    This is RUN/report.html, made from the files in RUN. RUN may also be the folder of a training,
    a loop (loop.html), a search (tune.html) or a study (study.html).
    """
    from fifa.config.tune import TUNE_FILE
    from fifa.evaluation.results import is_evaluated
    from fifa.evaluation.study import STUDY_FILE
    from fifa.reporting.loop import write_loop
    from fifa.reporting.page import is_training, write_report
    from fifa.reporting.study import write_study
    from fifa.reporting.tune import write_tune
    from fifa.run.folder import open_run
    from fifa.run.loop import LOOP_FILE

    pages = {STUDY_FILE: write_study, TUNE_FILE: write_tune, LOOP_FILE: write_loop}
    own = next((write for mark, write in pages.items() if Path(run, mark).is_file()), None)
    ready = is_evaluated(run) or is_training(run)
    if ready or own is None:
        report = write_report(run if ready else open_run(run).folder)
    if own is not None:  # a loop has both
        report = own(run)
    return answer(report, report=report)


@cli.command("train", cls=KnobCommand, knobs="Train")
@out_option("The folder of the checkpoint.")
@click.option(
    "--preset",
    help="A set of options: paper-sd15, paper-sdxl or lora-small; options given here win.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the options, and the steps, disk space and memory that they need; then stop.",
)
def train_command(out: Path, preset: str | None, dry_run: bool, **options: Any) -> Answer:
    """Train a diffusion model on the pairs.

    SOURCE is a RUN, a subset, or Parquet files in diffusers' schema. On several devices, use
    `accelerate launch -m fifa train ...`.
    """
    from fifa import config
    from fifa.config.train import FACTS_FILE
    from fifa.run.folder import check_run
    from fifa.shards.files import read_json
    from fifa.training.job import plan_training, run_training

    if preset and options["recipe"]:
        raise FifaError("a preset and a recipe at once", do="give one of --preset and --recipe")
    train = chosen(config.preset(preset) if preset else config.Train(), options)
    check_run(train.source)
    if dry_run:
        plan = plan_training(train, out)
        facts = {"options": train, "plan": str(plan).splitlines()}
        return Answer(f"{train.to_yaml()}\n{plan}", facts, after=plan.check)
    run_training(train, out)
    return answer(out, checkpoint=out, **read_json(out / FACTS_FILE, "the training", missing={}))


@cli.command("tune", cls=KnobCommand, knobs="Tune", sections=("train",))
@out_option("The folder of the search.")
def tune_command(out: Path, **options: Any) -> Answer:
    """Find knobs of a training by short parts of it.

    Trials with different knobs train for a few steps on the pairs of SOURCE; those that do best on
    held-out pairs go on. The last ones can be judged by images as well. `fifa train` takes the best
    knobs with --recipe OUT/best.yaml; all other options are the training's.
    """
    from fifa.config import Tune
    from fifa.console import echo
    from fifa.reporting.tune import PAGE, TRIALS, tune_text
    from fifa.run.tune import tune
    from fifa.shards.files import read_table

    best = tune(chosen(Tune(), options), out)
    echo(f"{tune_text(out)}\n{out / PAGE}")
    return answer(best, best=best, report=out / PAGE, trials=read_table(out / TRIALS).to_pylist())


@cli.group("reward")
def reward_group() -> None:
    """Train a reward model on the feedback."""


@reward_group.command("train", cls=KnobCommand, knobs="Reward")
@out_option("The folder of the reward model.")
def reward_train(out: Path, **options: Any) -> Answer:
    """Train a reward model on labelled pairs.

    It learns from the labels of SOURCE; `--margin proxy:FOLDER` then scores with it. Without
    --base it is a small head on frozen features, and only the options that begin with "Head"
    apply; with --base MODEL a CLIP is fine-tuned, and those that begin with "CLIP" apply.
    """
    from fifa.config import Reward
    from fifa.data.read import read_source
    from fifa.scoring.rewards.fit import train_reward
    from fifa.shards.files import read_json

    reward = chosen(Reward(), options)
    pairs = read_source(reward.read)
    folder = train_reward(pairs, out, reward).folder
    return answer(folder, **read_json(folder / "reward.json", "the reward model"))


@reward_group.command("rubric", cls=KnobCommand, knobs="Rubric")
@out_option("The folder of the rubric.")
def reward_rubric(out: Path, **options: Any) -> Answer:
    """Learn a rubric of yes-or-no questions from labelled pairs.

    A vision-language model answers the questions about the images of some pairs of SOURCE, and
    those whose answers tell what people prefer are kept, with weights. `--margin rubric:FOLDER`
    then scores with them.
    """
    from fifa.config import Rubric
    from fifa.data.read import read_source
    from fifa.scoring.judges.questions import train_rubric

    rubric = chosen(Rubric(), options)
    pairs = read_source(rubric.read)
    folder = train_rubric(pairs, out, rubric, rubric.compute).folder
    return answer(folder, rubric=folder)


@cli.group("batch")
def batch_group() -> None:
    """Rate prompts, or judge images, through batch files.

    These are the files of OpenAI's Batch API and of `vllm run-batch`.
    """


judge_option = click.option(
    "--judge",
    is_flag=True,
    help="Of the vision-language judge among the margins of RUN, instead of its rater.",
)


@batch_group.command("write")
@run_argument
@click.argument("file", type=Place(writes=True))
@judge_option
@click.option(
    "--reasoning",
    is_flag=True,
    help="For models that refuse max_tokens, a temperature and log-probabilities: write "
    "max_completion_tokens and neither of the others.",
)
def batch_write(run: str, file: Path, judge: bool, reasoning: bool) -> Answer:
    """Write the requests of RUN to FILE.

    There is one request for every prompt that the rater of RUN has not answered yet.
    """
    from fifa.console import echo
    from fifa.run.batch import write_run_batch

    count = write_run_batch(run, file, judge=judge, reasoning=reasoning)
    echo(f"{count:,} requests in {file}")
    return answer(file, file=file, requests=count)


@batch_group.command("read")
@run_argument
@click.argument("file", type=PATH)
@judge_option
def batch_read(run: str, file: Path, judge: bool) -> Answer:
    """Read the answers in FILE into RUN.

    `fifa score RUN` then does not send these requests.
    """
    from fifa.console import echo
    from fifa.run.batch import read_run_batch

    found = read_run_batch(run, file, judge=judge)
    echo(str(found))
    return Answer("", asdict(found))


@cli.command("demo", cls=KnobCommand, knobs="Demo")
@click.option(
    "--out",
    type=Place(writes=True),
    default=Path("demo-run"),
    show_default=True,
    help="The run folder.",
)
@open_option
def demo_command(out: Path, **options: Any) -> Answer:
    """The whole road in a small built-in world.

    Filter, train, generate, judge and report. No GPU is needed.
    """
    from fifa.config import Demo
    from fifa.demo import demo

    report = demo(out, chosen(Demo(), options))
    return answer(report, run=out, report=report)


@cli.command("info")
@click.argument("folder", type=PATH)
def info_command(folder: Path) -> Answer:
    """Show what is in a folder and what comes next.

    FOLDER is a run, a training, a search, a loop, a subset or a reward model: what was done there,
    what is stale because something else has changed, and the commands to go on with.
    """
    from fifa.run.info import info, info_text

    found = info(folder)
    return Answer(info_text(found), found.plain(), steps=False)


@cli.command("plan", cls=KnobCommand, knobs="Plan")
def plan_command(**options: Any) -> Answer:
    """Tell what a run will take, before it is spent.

    Hours, money, disk and network of every step of `fifa filter` and, with --train or --model, of
    `fifa train` on what it keeps, each with what the number rests on. SOURCE is a data set, or a
    recipe (a .yaml file). The steps are timed on a sample of SOURCE; nothing is written but the
    rates, and nothing is asked of an endpoint.
    """
    from fifa.config import Plan
    from fifa.run.cost import cost_text, plan_cost

    if (options["source"] or "").endswith((".yaml", ".yml")) and not options["recipe"]:
        options |= {"source": None, "recipe": Path(options["source"])}
    cost = plan_cost(chosen(Plan(), options))
    return Answer(cost_text(cost), cost.plain(), steps=False)


@cli.command("doctor")
@click.argument("folder", type=PATH, required=False)
@click.option("--bench", is_flag=True, help="Measure what this machine does, in about a minute.")
def doctor_command(folder: Path | None, bench: bool) -> Answer:
    """Check this machine and what is installed.

    Versions, devices, models on disk, and what is known not to work together, with what to do about
    it. The disk of FOLDER is measured, the current one if none is given. The text is fit for a bug
    report. The exit status is 1 where something has to be mended.
    """
    from fifa.run.doctor import doctor_facts, doctor_text, examine, rates

    checks = examine(folder or Path())
    checks += rates() if bench else []
    facts = doctor_facts(checks)
    return Answer(doctor_text(checks), facts, steps=False, code=int(facts["bad"] > 0))


class _Prints(Command):
    prints_result = False


@cli.command("completion", cls=_Prints)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    Put `eval "$(fifa completion bash)"` into ~/.bashrc, or the same with zsh into ~/.zshrc; with
    fish, write what is printed to ~/.config/fish/completions/fifa.fish.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, "click knows these shells"
    click.echo(found(cli, {}, "fifa", "_FIFA_COMPLETE").source())


@cli.command("convert", cls=KnobCommand, knobs="Convert")
@out_option("The folder, or with --layout kohya the .safetensors file, to write.")
def convert_command(out: Path, **options: Any) -> Answer:
    """Write a model or a LoRA in another layout.

    SOURCE with its --parts, --vae and --init-lora becomes one folder in diffusers' layout; a LoRA
    becomes a file that ComfyUI and the web UIs read.
    """
    from fifa.config import Convert
    from fifa.models.assemble import convert

    made = convert(chosen(Convert(), options), out)
    return answer(made, path=made)


@cli.command("evaluate", cls=KnobCommand, knobs="Evaluate")
@out_option()
@open_option
def evaluate_command(out: Path, **options: Any) -> Answer:
    """Compare checkpoints with their base model.

    All of them make images for the same prompts and seeds; the images are scored, compared and
    shown in a report.
    """
    from fifa.config import Evaluate
    from fifa.evaluation.models import name_checkpoints
    from fifa.reporting.page import write_report
    from fifa.run.evaluation import echo_wins, run_evaluation

    if options["tuned"]:
        options["tuned"] = name_checkpoints(options["tuned"])
    evaluated = run_evaluation(chosen(Evaluate(), options), out)
    report = write_report(evaluated.folder)
    echo_wins(evaluated)
    return answer(report, report=report, results=evaluated.results)


@cli.command("generate-pairs", cls=KnobCommand, knobs="GeneratePairs")
@out_option("The folder of the data set.")
def generate_pairs_command(out: Path, **options: Any) -> Answer:
    """Make a preference data set of a model's own images.

    The model makes several images for each prompt, reward models judge them, and those that they
    prefer are paired with others. `fifa filter`, `fifa read` and `fifa train` read the result.
    """
    from fifa.config import GeneratePairs
    from fifa.run.generation import echo_generated, run_generation

    made = run_generation(chosen(GeneratePairs(), options), out)
    echo_generated(made)
    return answer(made.path, path=made.path, margin=made.margin, **made.facts)


@cli.command("loop")
@click.argument("recipe", type=PATH)
@click.option("--rounds", type=click.IntRange(1), help="Rounds in all; if not given, the recipe's.")
@out_option("The loop's folder.")
def loop_command(recipe: Path, rounds: int | None, out: Path) -> Answer:
    """Train a model on pairs of its own images, round after round.

    RECIPE is a YAML file with the sections generate, score, select, train, evaluate and compute. In
    each round the model makes images, reward models judge them, the best pairs are kept, and the
    model is trained on them; then all rounds are compared with the base model.
    """
    from fifa.console import echo
    from fifa.reporting.loop import PAGE, loop_text
    from fifa.run.loop import loop

    done = loop(recipe, out, rounds=rounds)
    echo(loop_text(done.folder))
    report = done.folder / PAGE
    return answer(report, report=report, models=done.models, results=done.results)


@cli.command("study")
@click.argument("recipe", required=False)
@out_option("The study's folder.")
@click.option("--workers", type=click.IntRange(1), help="Processes that cells run in.")
@click.option("--dry-run", is_flag=True, help="Print the recipe and how many cells it has; stop.")
@click.option("--report", is_flag=True, help="Run no cell: only write the page again.")
@click.option(
    "--table",
    type=Place(writes=True),
    help="A Markdown page that the main table is written into, between its two markers.",
)
def study_command(
    recipe: str | None,
    out: Path,
    workers: int | None,
    dry_run: bool,
    report: bool,
    table: Path | None,
) -> Answer:
    """Train on many selections of one data set, by seed, and compare what they are worth.

    RECIPE is a YAML file with arms, parts and the sections read, score, select, train, evaluate and
    compute (docs/study.md); or moji, the study of the small world, or moji:FOLDER, the same in
    another world of its kind. Without RECIPE the study in OUT goes on.
    """
    from fifa.config import Study, changed
    from fifa.console import echo
    from fifa.evaluation.study import STUDY_FILE, TABLE, cells_of
    from fifa.moji.study import moji_study
    from fifa.reporting.study import put_table, study_text, write_study
    from fifa.shards.files import read_table

    if recipe is None:
        if not (out / STUDY_FILE).is_file():
            raise FifaError("no study here", where=str(out), do="give a RECIPE, such as moji")
        asked = Study.from_yaml(out / STUDY_FILE, sealed=True)
    elif recipe.partition(":")[0] == "moji":
        asked = moji_study(recipe.partition(":")[2] or None)
    else:
        asked = Study.from_yaml(Path(recipe))
    if workers:
        asked = changed(asked, compute={"executor": f"local:{workers}"})
    if dry_run:
        cells = len(cells_of(asked)) - 1
        return answer(f"{asked.to_yaml()}\n# {cells:,} cells", recipe=asked, cells=cells)
    if report:
        page = write_study(out)
    else:
        from fifa.moji.family import FEEDBACK, RATINGS
        from fifa.moji.judges import moji_judges
        from fifa.run.study import study

        # of another world the ratings are made here, and their seconds counted
        scores = RATINGS if asked.read.source == str(FEEDBACK) else None
        page = study(asked, out, judges=moji_judges if asked.judge else None, scores=scores)
    if table:
        put_table(out, table)
    echo(study_text(out))
    return answer(page, page=page, summary=read_table(out / TABLE).to_pylist())


@cli.command("compare")
@click.argument("runs", nargs=-1, type=Place(kind=str), required=True, callback=check_runs)
@click.option(
    "--out",
    type=Place(writes=True, dir_okay=False),
    default=Path("compare.html"),
    show_default=True,
    help="The page to write.",
)
def compare_command(runs: tuple[str, ...], out: Path) -> Answer:
    """Compare several evaluated runs.

    The result is one page with a table and a figure of all RUNS.
    """
    from fifa.console import echo
    from fifa.evaluation.compare import compare_runs
    from fifa.reporting.page import comparison_text, write_comparison

    compared = compare_runs(runs)
    for difference in compared.differences:
        echo(f"not the same in all runs: {difference}")
    echo(comparison_text(compared))
    page = write_comparison(compared, out)
    return answer(page, page=page, **vars(compared))


class _ServeByDefault(Group):
    """A group where ``vote RUN`` is ``vote serve RUN``; a run named like a command is ./NAME."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@cli.group("vote", cls=_ServeByDefault)
def vote_group() -> None:
    """Let people vote on the images of a run.

    They see two images for one prompt and choose the better one. `fifa vote RUN` is short for
    `fifa vote serve RUN`.
    """


class _Serve(KnobCommand):
    prints_result = False  # but links, while it runs


@vote_group.command("serve", cls=_Serve, knobs="Vote")
@click.argument("runs", nargs=-1, type=RUN, required=True, metavar="RUN...", callback=check_runs)
@click.option("--new-invitation", is_flag=True, help="Make earlier invitation links invalid.")
def vote_serve(runs: tuple[str, ...], new_invitation: bool, **options: Any) -> None:
    """Serve the page where people vote.

    `fifa vote RUN` does the same. Several runs get a page each, and one that lists them.
    """
    from fifa.config import Vote
    from fifa.evaluation.vote.serve import serve_votes

    vote = chosen(Vote(), options)
    serve_votes(runs, vote, new_invitation=new_invitation, show_link=click.echo)


everybody_option = click.option(
    "--everybody", is_flag=True, help="Also count voters who failed their attention checks."
)
database_option = click.option(
    "--database", metavar="URL", help="Where the votes are, if they are in PostgreSQL."
)


@vote_group.command("results")
@run_argument
@everybody_option
@database_option
def vote_results(run: str, everybody: bool, database: str | None) -> Answer:
    """Show win rates and agreement so far.

    Win rates have intervals; agreement is that among the voters.
    """
    from fifa.evaluation.vote.results import results_text, vote_results

    found = vote_results(run, everybody=everybody, database=database)
    return Answer(results_text(found), found.plain(), steps=False)


@vote_group.command("export")
@run_argument
@out_option("The .parquet file to write.")
@everybody_option
@database_option
def vote_export(run: str, out: Path, everybody: bool, database: str | None) -> Answer:
    """Write the votes as a data set.

    It is a preference data set that `fifa filter` reads.
    """
    from fifa.console import echo
    from fifa.evaluation.vote.export import export_votes

    done = export_votes(run, out, everybody=everybody, database=database)
    echo(f"{done.pairs:,} pairs from {done.votes:,} votes; {done.left_out:,} votes left out")
    return answer(done.path, **asdict(done))
