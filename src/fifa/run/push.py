"""PUSH: subsets and checkpoints as repositories of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa.console import echo
from fifa.data.subset import SUBSET_FILE, check_subset
from fifa.errors import FifaError
from fifa.selection.export import load_subset, refuse_others
from fifa.shards.manifest import check_manifest

AGAIN = "run it again: what the hub has already is not sent again"
WORDS = {  # what an answer of the hub means, and what to do
    401: ("the hub does not accept the token", "set HF_TOKEN to a valid one, or run hf auth login"),
    402: ("the hub wants to be paid for this", "free space there, or choose another name"),
    403: ("the token may not write there", "use a token that may write, and a name of your own"),
    404: ("no such repository, or the token may not see it", "check the name and the token"),
    409: ("the repository has been changed meanwhile", AGAIN),
    413: ("a file is too large for the hub", "see its limits, or push fewer pairs"),
    429: ("too many requests", f"wait some minutes and {AGAIN}"),
}


@dataclass(frozen=True)
class Kind:
    """What can be pushed.

    Parameters
    ----------
    repo
        The hub's kind of repository: ``dataset`` or ``model``.
    files
        The names (with ``*``) of its files that are pushed.
    """

    repo: str
    files: tuple[str, ...] = ("*",)


_WEIGHTS = ("README.md", "*.safetensors", "*.safetensors.index.json", "*/config.json")
KINDS = {  # by the file that is written last, so that a folder without it is not whole
    SUBSET_FILE: Kind("dataset"),
    "train.json": Kind("model", (*_WEIGHTS, "train.json", "train.yaml", "stats.jsonl")),
    "reward.json": Kind("model", (*_WEIGHTS, "*.json", "*.txt", "*.model")),
}
# of fifa's own use: locks, states and caches, and what a loop makes of a checkpoint
IGNORED = (
    *(".*", "*/.*", "state/*", "state-*", "checkpoints/*", "cache/*", "logs/*", "device.json"),
    "pipeline/*",
)


def push(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Upload a subset or a checkpoint to the hub, with its card, in one commit.

    Parameters
    ----------
    folder
        A subset that `fifa.export` wrote, a finished training, or a reward model.
    name
        The repository, ORG/NAME. It is made if it is not there; one that fifa pushed before is
        replaced as a whole.
    public
        Let everybody see it; otherwise it is private.

    Returns
    -------
    str
        The repository's address.

    Raises
    ------
    FifaError
        For a folder of something else or that is not as fifa wrote it, no token, a repository with
        other things in it or that is public without ``public``, and whatever the hub answers. Until
        the end nothing there has changed; what was uploaded until then is not sent again by the
        next try.
    """
    import huggingface_hub as hub

    check_push(name)
    folder = Path(folder)
    mark = next((file for file in KINDS if (folder / file).is_file()), None)
    if mark is None:
        raise FifaError(
            "nothing to push: no subset, no finished training and no reward model",
            where=str(folder),
            do="name the subset of a run (RUN/subset) or the folder of a training that is finished",
        )
    check_manifest(folder)
    if mark == SUBSET_FILE:
        refuse_others(folder)
        load_subset(folder / mark)
        check_subset(folder)
    kind, api = KINDS[mark], hub.HfApi(token=hub.get_token())
    with _in_words(name):
        api.create_repo(name, repo_type=kind.repo, private=not public, exist_ok=True)
        there = api.repo_info(name, repo_type=kind.repo)
        _check_there(there, name, mark, public)
        api.upload_folder(
            repo_id=name,
            repo_type=kind.repo,
            folder_path=folder,
            commit_message=f"{mark.removesuffix('.json')} by fifa",
            allow_patterns=list(kind.files),
            ignore_patterns=list(IGNORED),
            delete_patterns="*",  # what was pushed before; it goes in the same commit
        )
    address = f"{api.endpoint}/{'datasets/' * (kind.repo == 'dataset')}{name}"
    echo(f"pushed to {address} ({'private' if there.private else 'public'})")
    return address


def check_push(name: str) -> None:
    """Raise `FifaError` for a name that is none of the hub's, and without a token."""
    import huggingface_hub as hub

    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", name) or re.search(r"\.\.|--|\.git$", name):
        raise FifaError(f"{name!r} is no name of a repository", do="write ORG/NAME")
    if not (token := hub.get_token()) or not token.isascii():
        raise FifaError(
            "no token for the hub, or one with letters that none has",
            do="set HF_TOKEN to one that may write, or run `hf auth login`",
        )


def _check_there(there: Any, name: str, mark: str, public: bool) -> None:
    """Raise `FifaError` for a repository that is not ours to replace, or that all can see."""
    files = {file.rfilename for file in there.siblings or ()} - {".gitattributes", "README.md"}
    if files and mark not in files:
        raise FifaError(
            f"the repository has other files and no {mark} of fifa's",
            where=name,
            do="choose another name",
        )
    if not there.private and not public:
        raise FifaError(
            "the repository is public",
            where=name,
            do="add --public if everybody may see it, or make it private in its settings",
        )


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """What the hub's client raises becomes a `FifaError`."""
    import huggingface_hub as hub

    http: Any = hub.errors
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, http.HTTPError) as error:
        told: BaseException = error
        while not isinstance(told, hub.errors.HfHubHTTPError) and told.__cause__ is not None:
            told = told.__cause__
        status = getattr(getattr(told, "response", None), "status_code", 0)
        what, do = WORDS.get(status, ("the upload failed", AGAIN))
        if status >= 500:
            what = f"the hub does not work at the moment (it answered {status})"
        lines = [line for line in str(told).splitlines() if line.strip()]
        detail = f": {lines[-1 if status else 0][:300]}" if lines else ""
        raise FifaError(what + detail, where=name, do=do) from error
