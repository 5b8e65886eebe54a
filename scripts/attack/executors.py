"""Workers, nodes and drivers killed in every step that an executor runs; then the bytes compared.

Each command runs once in one process, undisturbed. Then it runs on two processes of this machine
and on two Ray nodes simulated here, and once the step has kept some shard, drawn by the seed, one
is killed with SIGKILL: the worker process with the next shard, its node, or the driver, after which
the same command is given again. Right is every byte of the first run, but for times and the recipe,
which names the executor; and that the workers of a driver that was killed end.

    python scripts/attack/executors.py --tries 1 --seed 2611 [--only neighbours]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))

from kill import TIMES, TRAINING_TIMES, contents  # noqa: E402

NEVER_SAME = (*TIMES, *TRAINING_TIMES, "recipe.yaml", "evaluate.yaml", "train.yaml", "study.*")
NEVER_SAME += ("cells/*", "scored.json")  # of a study: they tell seconds
SECONDS = ("scoring", "selecting", "training", "imaging", "points")  # columns of a study's table
PATIENCE = 300.0  # seconds that a command may take to reach a shard, and a worker to end
NODES, STORE = 2, 80 << 20  # of the simulated cluster, and bytes of each one's object store
# In a driver: shards of few things, then the command with something that waits for its end
CHILD = "import executors, sys; executors.drive(*sys.argv[1:4], sys.argv[4:])"
HERE, LOCAL, RAY = "local", "local:2", "ray"
VICTIMS = ((LOCAL, "worker"), (LOCAL, "driver"), (RAY, "worker"), (RAY, "node"), (RAY, "driver"))


def drive(place: str, step: str, moment: str, words: list[str]) -> None:
    """Run a command in this process, whose workers stop at a shard of a step."""
    from fifa.cli import main
    from fifa.evaluation import generate
    from fifa.scoring import diversity, elsewhere, encoders, quality
    from fifa.scoring.rewards import engine, features
    from fifa.shards.pool import LocalPool
    from fifa.shards.ray import RayPool
    from fifa.training import cache

    for module in (encoders, quality, features, elsewhere, cache):
        module.SHARD = 12
    diversity.QUERIES, generate.USUAL = 12, 4
    engine.PROMPT_SHARD, engine.DIGEST_SHARD = 12, 24
    engine.Engine.__post_init__ = lambda self: object.__setattr__(self, "shard", 12)
    for kind in (LocalPool, RayPool) if step else ():

        def run(self: Any, make: Any, shards: Any, ledger: Any, plain: Any = kind.map) -> Any:
            if re.search(step, str(ledger.place)) and not getattr(self, "is_here", False):
                make = Stopping(make, place, step, int(moment))
            return plain(self, make, shards, ledger)

        kind.map = run
    sys.argv = ["fifa", *words]
    main()


@dataclass(frozen=True)
class Stopping:
    """Makes a step in a worker that stops at a shard, before or after its table is kept."""

    make: Callable[[], Any]
    place: str
    step: str
    moment: int

    def __call__(self) -> Any:
        """The step itself: what keeps its tables stops."""
        from fifa.shards import pool

        if not hasattr(pool._keep, "stops"):
            pool._keep = self.stopping(pool._keep)
        return self.make()

    def stopping(self, keep: Callable[..., str]) -> Callable[..., str]:
        """``keep``, which waits for its end when it has the shard whose number it is."""

        def kept(key: str, finished: Any, ledger: Any) -> str:
            number = _next(Path(self.place)) if re.search(self.step, str(ledger.place)) else 0
            if number == self.moment and number % 2:
                self.wait()
            key = keep(key, finished, ledger)
            if number == self.moment and number:
                self.wait()
            return key

        kept.stops = True  # type: ignore[attr-defined]
        return kept

    def wait(self) -> None:
        """Say where this is, and go on only if nobody ends it."""
        known: dict[str, Any] = {"process": os.getpid()}
        if "ray" in sys.modules and (ray := sys.modules["ray"]).is_initialized():
            known["node"] = ray.get_runtime_context().get_node_id()
        part = Path(self.place, "part")
        part.write_text(json.dumps(known))
        part.rename(Path(self.place, "reached"))
        time.sleep(2 * PATIENCE)


def _next(place: Path) -> int:
    """How many times this was called for a folder, over all processes."""
    number = 1
    while True:
        with suppress(FileExistsError):
            os.close(os.open(place / str(number), os.O_CREAT | os.O_EXCL))
            return number
        number += 1


@dataclass(frozen=True)
class Step:
    """A step of a command that an executor runs.

    ``ledger`` is in the name of the folder of its shards, and of no other step's of that command.
    """

    name: str
    ledger: str
    command: str


NONE = "--quality none --diversity none"
IMAGES = f"score {{source}} --margin clipscore:{{clip}} {NONE}"
PROXY = f"score {{source}} --margin proxy@clip:{{clip}} {NONE}"
JUDGE = f"score {{source}} --margin vlm:m@{{url}} --in-flight 2 {NONE}"
PROMPTS = "score {source} --margin column:clipscore_0,clipscore_1"
RATED = f"{PROMPTS} --quality local:{{lm}} --diversity none"
DIVERSE = f"{PROMPTS} --quality none --diversity clip:{{clip}}"
EVALUATE = "evaluate --base {sd} --tuned again={sd} --prompts {prompts} --seeds 2 --steps 2"
EVALUATE += " --device cpu --encoder none --score clipscore:{clip}"
STUDY = "study {study}"
STEPS = (
    Step("which images are equal", "parts-images-bytes", IMAGES),
    Step("a reward model: prompts", "parts-prompts", IMAGES),
    Step("a reward model: images", "parts-margin", IMAGES),
    Step("a proxy's features", "parts-features", PROXY),
    Step("ratings by a local model", "parts-quality", RATED),
    Step("a judge behind an endpoint", "parts-margin", JUDGE),
    Step("embeddings", "parts-embeddings", DIVERSE),
    Step("neighbours", "parts-diversity", DIVERSE),
    Step("images of `evaluate`", "parts-images$", EVALUATE),
    Step("scores of `evaluate`", "parts-rewards", EVALUATE),
    Step("cells of a study", "/cells$", STUDY),
)


class Endpoint(BaseHTTPRequestHandler):
    """A judge behind an endpoint, whose answer follows from the question alone."""

    def do_POST(self) -> None:
        """Prefer one of two images."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        side = "AB"[
            hashlib.sha256(json.dumps(json.loads(body)["messages"]).encode()).digest()[0] % 2
        ]
        said = json.dumps(
            dict.fromkeys(("alignment", "coherence", "taste", "winner"), side)
            | {"safety": "tie"}
        )
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": said},
        }
        data = json.dumps(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def endpoint() -> Iterator[str]:
    """Its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


class Nodes:
    """A Ray cluster on this machine: a head, which works on nothing, and nodes of a processor."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        plain = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=plain)
        self.nodes = [self.start() for _ in range(NODES)]

    def start(self) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def kill(self, name: str) -> None:
        """Kill a node and everything on it, and start another one in its place."""
        (node,) = [node for node in self.nodes if node.node_id == name]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.start())
        self.cluster.wait_for_nodes()


@dataclass
class World:
    """Where everything lies, and what commands leave there that nobody disturbs."""

    folder: Path
    names: dict[str, str]
    nodes: Nodes | None = None
    known: dict[str, dict[str, bytes]] = field(default_factory=dict)
    shards: dict[Step, int] = field(default_factory=dict)

    def start(
        self, step: Step, executor: str, out: Path, stops: tuple[Path, int] | None = None
    ) -> subprocess.Popen[bytes]:
        """A command in a process of its own, which stops at a shard of the step."""
        study = self.names["study"].format(executor=executor)
        words = [*step.command.format(**self.names | {"study": study}).split(), "--out", str(out)]
        if step.command != STUDY:
            words += ["--executor", executor, "--actors", str(NODES)]
        place, moment = stops or ("", 0)
        given = [str(place), step.ledger if stops else "", str(moment)]
        environment = dict(os.environ)
        if self.nodes is not None:
            environment["RAY_ADDRESS"] = self.nodes.cluster.address
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *given, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def expected(self, step: Step) -> dict[str, bytes]:
        """What the command leaves where this is all that runs."""
        if step.command not in self.known:
            out = self.folder / f"expected-{len(self.known)}"
            finish(self.start(step, HERE, out))
            self.known[step.command] = found(out)
        return self.known[step.command]

    def count(self, step: Step) -> int:
        """How many shards the step has on two processes, and whether the bytes are the same."""
        if step not in self.shards:
            place = Path(tempfile.mkdtemp(dir=self.folder))
            finish(self.start(step, LOCAL, place / "out", (place, 0)))
            if differing := self.differing(step, place / "out"):
                raise SystemExit(f"{step.name}, on two processes: {differing}")
            self.shards[step] = sum(path.name.isdigit() for path in place.iterdir())
        return self.shards[step]

    def differing(self, step: Step, out: Path) -> str:
        """The files that are not as they should be."""
        here, expected = found(out), self.expected(step)
        names = sorted({*here, *expected})
        return ", ".join(name for name in names if here.get(name) != expected.get(name))

    def attack(self, step: Step, executor: str, victim: str, moment: int) -> str:
        """The verdict on one kill; right is ""."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        process, out = self.start(step, executor, place / "out", (place, moment)), place / "out"
        try:
            wait_for((place / "reached").exists, process)
        except TimeoutError:
            process.kill()
            return "wrong: never came to the shard: " + said(process)
        reached = json.loads((place / "reached").read_text())
        if victim == "worker":
            os.kill(reached["process"], signal.SIGKILL)
        elif victim == "node":
            assert self.nodes is not None
            self.nodes.kill(reached["node"])
        else:
            process.kill()
            process.communicate()
            try:
                wait_for(lambda: not lives(reached["process"]))
            except TimeoutError:
                return "wrong: a worker goes on without its driver"
            process = self.start(step, executor, out)
        try:
            data = process.communicate(timeout=2 * PATIENCE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return "wrong: hangs: " + said(process)
        if process.returncode:
            return f"wrong: ends with {process.returncode}: {data.decode()[-1500:]}"
        differing = self.differing(step, out)
        return f"wrong: other bytes: {differing}" if differing else ""


def found(out: Path) -> dict[str, bytes]:
    """What a command has left, but for what tells times and who ran it."""
    files = contents(out, NEVER_SAME)
    if (table := out / "study.parquet").exists():
        import pyarrow.parquet as pq

        rows = pq.read_table(table).drop_columns(SECONDS).to_pylist()
        files["study.parquet"] = repr(rows).encode()
    return files


def said(process: subprocess.Popen[bytes]) -> str:
    return process.communicate()[0].decode()[-1500:]


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command that nobody disturbs."""
    text = said(process)
    if process.returncode:
        raise SystemExit(f"a command failed with {process.returncode}:\n{text}")


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Return once something is true; raises `TimeoutError` where it does not become so."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end or (process and process.poll() is not None):
            raise TimeoutError
        time.sleep(0.01)


def lives(process: int) -> bool:
    """Whether a process is there, and not only its entry."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def make_world(folder: Path, url: str) -> World:
    """A source, prompts, a tiny language model, the recipe of a study."""
    import pyarrow.parquet as pq
    import yaml
    from transformers import PreTrainedTokenizerFast

    from fifa.moji.family import CLIP, FEEDBACK, SD

    sys.path.append(str(SCRIPTS.parent / "tests" / "scoring"))
    from tiny_lm import byte_tokenizer, tiny_llama

    source, prompts, lm = folder / "source.parquet", folder / "prompts.txt", folder / "lm"
    table = pq.read_table(FEEDBACK).slice(0, 60)
    uids = [name for name in table.column_names if name.endswith("uid")]
    pq.write_table(table.drop_columns(uids), source)  # so that images are told apart by their bytes
    prompts.write_text("".join(f"a red apple, number {i}\n" for i in range(8)), "utf-8")
    tiny_llama().save_pretrained(lm)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(lm)
    for executor in (HERE, LOCAL, RAY):
        knobs = {
            "arms": {"fifa": {}, "random": {"select": {"strategy": "random"}}},
            "parts": [{"name": "main", "arms": ["fifa", "random"], "budgets": [0.2]}],
            "seeds": [1, 2],
            "against": "random",
            "target": ["random"],
            "read": {"source": str(source)},
            "score": {"margin": ["column:clipscore_0,clipscore_1"], "quality": "none"}
            | {"diversity": "none"},
            "train": {"model": str(SD), "steps": 2, "batch": 2, "micro_batch": 2, "rank": 2}
            | {"device": "cpu"},
            "evaluate": {"prompts": str(prompts), "limit": 2, "seeds": 2}
            | {"generate": {"steps": 2, "guidance": 1.0, "batch": 4, "device": "cpu"}}
            | {"measure": {"scorers": [f"clipscore:{CLIP}"], "encoder": "none"}},
            "compute": {"device": "cpu", "executor": executor, "actors": NODES},
        }
        (folder / f"study-{executor}.yaml").write_text(yaml.safe_dump(knobs), "utf-8")
    names = {"source": source, "prompts": prompts, "lm": lm, "clip": CLIP, "sd": SD, "url": url}
    names["study"] = folder / "study-{executor}.yaml"
    return World(folder, {name: str(value) for name, value in names.items()})


def main() -> None:
    """Print a row a step; exit 1 where something was not right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=1, help="of each step and victim")
    parser.add_argument("--seed", type=int, default=0, help="of the shards")
    parser.add_argument("--only", default="", help="steps with this in their name")
    parser.add_argument("--executor", choices=(LOCAL, RAY), help="this one only")
    asked = parser.parse_args()
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    draw, wrong = random.Random(asked.seed), 0
    victims = [one for one in VICTIMS if asked.executor in (None, one[0])]
    with tempfile.TemporaryDirectory() as name, endpoint() as url:
        world = make_world(Path(name), url)
        if any(executor == RAY for executor, _ in victims):
            world.nodes = Nodes()
        try:
            print(" | ".join(["step", "shards", *map(": ".join, victims)]), flush=True)
            for step in (step for step in STEPS if asked.only in step.name):
                count, cells = world.count(step), []
                for executor, victim in victims:
                    moments = [draw.randint(1, count) for _ in range(asked.tries)]
                    told = [world.attack(step, executor, victim, moment) for moment in moments]
                    for moment, one in zip(moments, told, strict=True):
                        if one:
                            print(
                                f"  {step.name}, {executor}, {victim}, {moment}: {one}", flush=True
                            )
                    wrong += sum(map(bool, told))
                    cells.append(f"{told.count('')} of {len(told)}")
                print(" | ".join([step.name, str(count), *cells]), flush=True)
        finally:
            if world.nodes is not None:
                world.nodes.cluster.shutdown()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
