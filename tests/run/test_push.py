"""Pushing through the hub's own client, against a hub on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

import fifa
from fifa.config import Read, Recipe, Score, Select
from fifa.errors import FifaError
from fifa.shards.manifest import write_manifest

TOKEN = "hf_right"
# of the hub's client, when it sends a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(BaseHTTPRequestHandler):
    """What the hub's API does with new repositories, large files and commits.

    ``fails`` are answers that it gives once, in order, by a word of the request's path.
    """

    protocol_version = "HTTP/1.1"
    address: str
    repos: dict[str, dict[str, Any]]  # by kind/ORG/NAME: private, files
    blobs: dict[str, bytes]  # large files by sha256
    fails: dict[str, list[int]]
    asked: list[str]

    def do_GET(self) -> None:
        self.handle_request(b"")

    def do_POST(self) -> None:
        self.handle_request(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self) -> None:
        body = b""
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else:  # in chunks
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.handle_request(body)

    def handle_request(self, body: bytes) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append(f"{self.command} {path}")
        word = next((word for word in self.fails if word in path and self.fails[word]), None)
        if word:
            return self.answer(self.fails[word].pop(0), {"error": f"{word} does not work"})
        if self.command == "PUT":
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.blobs[oid] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        found = re.fullmatch(r"/(?:api/)?(?:(models|datasets)/)?([\w-]+/[\w-]+)(.*)", path)
        assert found, path
        repo = self.repos.get(f"{found[1] or 'models'}/{found[2]}")
        if repo is None:
            return self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        if found[3] == "":
            names = [{"rfilename": name} for name in repo["files"]]
            info = {"id": found[2], "sha": "1" * 40, "private": repo["private"], "siblings": names}
            return self.answer(200, info)
        if found[3] == "/tree/main":
            files = repo["files"].items()
            return self.answer(200, [self.entry(name, data) for name, data in files])
        if found[3] == "/preupload/main":
            return self.answer(200, {"files": list(map(self.mode, json.loads(body)["files"]))})
        if found[3] == ".git/info/lfs/objects/batch":
            objects = list(map(self.large, json.loads(body)["objects"]))
            return self.answer(200, {"transfer": "basic", "objects": objects})
        assert found[3] == "/commit/main", path
        self.commit(repo, [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        key, url = f"{kind}s/{name}", {"url": f"{self.address}/{name}"}
        if key in self.repos:
            return self.answer(409, url | {"error": "You already created this repo"})
        private = asked.get("visibility") == "private"
        self.repos[key] = {"private": private, "files": {".gitattributes": b""}}
        self.answer(200, url)

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": len(data)}

    @staticmethod
    def mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".parquet", ".safetensors"))
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def large(self, file: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] in self.blobs:
            return known
        return known | {"actions": {"upload": {"href": f"{self.address}/blob/{file['oid']}"}}}

    def commit(self, repo: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        files = dict(repo["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo["files"] = files
        oid = "2" * 40
        self.answer(200, {"commitUrl": f"{self.address}/c/{oid}", "commitOid": oid})

    def answer(self, status: int, content: object, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repos, Hub.blobs, Hub.fails, Hub.asked = {}, {}, {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        Hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", Hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, between its tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Hub
        server.shutdown()


@pytest.fixture(scope="module")
def run(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(
        read=Read(source=str(shipped)),
        score=Score(("column:clipscore_0,clipscore_1",), quality="none", diversity="none"),
        select=Select(keep=6),
    )
    return fifa.filter_pairs(recipe, tmp_path_factory.mktemp("push") / "run").folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed(hub: type[Hub], key: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[key]["files"].items() if name[0] != "."}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a finished training, and those that are its own business."""
    folder = tmp_path / "checkpoint"
    for name in (
        "README.md",
        "pytorch_lora_weights.safetensors",
        "train.yaml",
        "stats.jsonl",
        "train.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "state/step-7/state.pt",
        "state/step-7/state.json",
        "checkpoints/step-5/pytorch_lora_weights.safetensors",
        "logs/events.out.tfevents.1",
        "cache/latents.npy",
        "pipeline/unet/config.json",
        "pipeline/vae/diffusion_pytorch_model.safetensors",
        "device.json",
        ".fifa-lock",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def test_a_subset_arrives_whole_and_private(hub: type[Hub], run: Path) -> None:
    address = fifa.push(run / "subset", "someone/pairs")
    assert address == f"{hub.address}/datasets/someone/pairs"
    assert hub.repos["datasets/someone/pairs"]["private"]
    assert pushed(hub, "datasets/someone/pairs") == contents(run / "subset")
    assert len(hub.blobs) == 1


def test_of_a_checkpoint_the_weights_and_what_describes_them_arrive(
    hub: type[Hub], checkpoint: Path
) -> None:
    fifa.push(checkpoint, "someone/model", public=True)
    assert not hub.repos["models/someone/model"]["private"]
    assert set(pushed(hub, "models/someone/model")) == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "train.yaml",
        "stats.jsonl",
        "train.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_what_was_pushed_before_is_replaced_as_a_whole(hub: type[Hub], run: Path) -> None:
    fifa.push(run / "subset", "someone/pairs")
    files = hub.repos["datasets/someone/pairs"]["files"]
    files["data/train-of-an-older-selection.parquet"] = b"old"
    fifa.push(run / "subset", "someone/pairs")
    assert pushed(hub, "datasets/someone/pairs") == contents(run / "subset")


def test_a_second_try_sends_no_large_file_again(hub: type[Hub], run: Path) -> None:
    hub.fails["/commit/"] = [503]
    with pytest.raises(FifaError, match=r"the hub does not work at the moment .*503") as caught:
        fifa.push(run / "subset", "someone/pairs")
    assert "run it again" in str(caught.value)
    assert pushed(hub, "datasets/someone/pairs") == {}
    assert sum(line.startswith("PUT") for line in hub.asked) == 1
    fifa.push(run / "subset", "someone/pairs")
    assert sum(line.startswith("PUT") for line in hub.asked) == 1
    assert pushed(hub, "datasets/someone/pairs") == contents(run / "subset")


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/repos/create", 409, "the upload failed"),
        ("/repos/create", 403, "the token may not write there"),
        ("/repos/create", 500, "does not work at the moment"),
        ("/preupload/", 403, "the token may not write there"),
        ("/preupload/", 429, "too many requests"),
        ("/lfs/objects/batch", 500, "does not work at the moment"),
        ("/blob/", 403, "the token may not write there"),
        ("/commit/", 409, "the repository has been changed meanwhile"),
        ("/commit/", 413, "a file is too large for the hub"),
        ("/commit/", 418, "the upload failed"),
    ],
)
def test_whatever_the_hub_answers_is_told_in_words(
    hub: type[Hub], run: Path, where: str, status: int, words: str
) -> None:
    hub.fails[where] = [status] * 50
    with pytest.raises(FifaError, match=words) as caught:
        fifa.push(run / "subset", "someone/pairs")
    assert caught.value.where == "someone/pairs" and caught.value.do
    assert not any(pushed(hub, key) for key in hub.repos)
    hub.fails.clear()
    fifa.push(run / "subset", "someone/pairs")
    assert pushed(hub, "datasets/someone/pairs") == contents(run / "subset")


def test_a_token_that_is_wrong_or_missing_is_told(
    hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FifaError, match="the hub does not accept the token"):
        fifa.push(run / "subset", "someone/pairs")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.asked.clear()
    with pytest.raises(FifaError, match=r"no token(.|\n)*HF_TOKEN(.|\n)*hf auth login"):
        fifa.push(run / "subset", "someone/pairs")
    assert hub.asked == []


def test_a_hub_that_is_not_there_is_told(
    hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FifaError, match="the upload failed"):
        fifa.push(run / "subset", "someone/pairs")


def test_repositories_of_others_and_public_ones_are_left_alone(hub: type[Hub], run: Path) -> None:
    mine: dict[str, Any] = {"private": True, "files": {"train.csv": b"1", "README.md": b"#"}}
    hub.repos["datasets/someone/other"] = mine
    with pytest.raises(FifaError, match=r"other files and no subset\.json"):
        fifa.push(run / "subset", "someone/other")
    hub.repos["datasets/someone/open"] = {"private": False, "files": {}}
    with pytest.raises(FifaError, match="the repository is public"):
        fifa.push(run / "subset", "someone/open")
    assert set(mine["files"]) == {"train.csv", "README.md"}
    fifa.push(run / "subset", "someone/open", public=True)
    assert pushed(hub, "datasets/someone/open") == contents(run / "subset")


@pytest.mark.parametrize(
    "name", ["pairs", "a/b/c", "someone/", "someone/../x", "some one/pairs", "a/b.git"]
)
def test_a_name_that_is_none_of_the_hubs_is_refused(hub: type[Hub], run: Path, name: str) -> None:
    with pytest.raises(FifaError, match="no name of a repository"):
        fifa.push(run / "subset", name)
    assert hub.asked == []


def test_a_folder_of_something_else_is_refused(hub: type[Hub], run: Path, tmp_path: Path) -> None:
    for folder in (run, tmp_path):  # a run is no subset
        with pytest.raises(FifaError, match=r"nothing to push(.|\n)*RUN/subset"):
            fifa.push(folder, "someone/pairs")
    assert hub.asked == []


def test_what_is_not_as_it_was_written_stays_here(
    hub: type[Hub], run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def change(folder: Path, name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder

    def copy(name: str) -> Path:
        return Path(shutil.copytree(run / "subset", tmp_path / name))

    (shard,) = (run / "subset" / "data").iterdir()
    linked = copy("linked")
    (linked / "data" / "link").symlink_to("/etc/hostname")
    write_manifest(checkpoint, [checkpoint / "train.json"])
    for folder, words in [
        (change(copy("notes"), "notes.txt", b"mine"), "other things in it: notes.txt"),
        (linked, "other things in it: data/link"),
        (change(copy("cut"), f"data/{shard.name}", b"PAR1"), "is damaged"),
        (change(copy("other"), "subset.json", b"{}"), "not a subset.json"),
        (change(checkpoint, "train.json", b"{}"), "not as it was written"),
    ]:
        with pytest.raises(FifaError, match=words):
            fifa.push(folder, "someone/pairs")
    assert hub.asked == []


def test_the_commands_push(hub: type[Hub], run: Path, checkpoint: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> str:
        env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        env["HF_HOME"] = str(tmp_path / "home")
        line = [sys.executable, "-m", "fifa", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = command("export", run, "--push-to-hub", "someone/pairs", "--out", tmp_path / "subset")
    assert told.splitlines()[-1] == f"{hub.address}/datasets/someone/pairs"
    assert pushed(hub, "datasets/someone/pairs") == contents(tmp_path / "subset")
    table = pq.read_table(tmp_path / "subset" / "data")
    assert table.num_rows == 6
    assert command("push", checkpoint, "someone/model") == f"{hub.address}/someone/model\n"
    assert hub.repos["models/someone/model"]["private"]
