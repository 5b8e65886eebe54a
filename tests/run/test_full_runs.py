"""A full disk and a folder that takes no file: every step says so, and goes on afterwards."""

import shutil

import pytest

from attack.folders import COMMANDS, files_of, filter_run, make_run
from fifa.errors import FifaError
from fifa.run.folder import open_run
from fifa.run.steps import filter_pairs
from fifa.shards.files import LOCK, PREFIX

WRITERS = [name for name in COMMANDS if name not in ("train", "read")]


def contents(run):
    return {name: (run / name).read_bytes() for name in files_of(run) if name != "log.jsonl"}


def left_behind(run):
    return [path.name for path in run.rglob("*") if path.name.startswith((PREFIX, LOCK))]


def test_a_full_disk_is_told_at_every_step_and_nothing_is_lost(mount_disk, tmp_path):
    disk = mount_disk("1m")
    run = make_run(disk)
    whole = shutil.copytree(run, tmp_path / "whole")
    told = set()
    for command in [*WRITERS, "scratch"]:
        for room in (0, 4096, 16_384):
            shutil.rmtree(run)
            if command != "scratch":
                shutil.copytree(whole, run)
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - room))
            try:
                (filter_run if command == "scratch" else COMMANDS[command])(run)
            except FifaError as error:
                assert "cannot write" in str(error)
                told.add(command)
            (disk / "filler").unlink()
            assert not left_behind(disk)
        filter_run(run)
        assert contents(run) == contents(whole)
    assert told == {*WRITERS, "scratch"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_takes_no_file_is_told(run, command, monkeypatch):
    """As a read-only one, but also for root."""

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fifa.shards.files.tempfile.mkstemp", refuse)
    monkeypatch.setattr("fifa.shards.files.tempfile.mkdtemp", refuse)
    before = contents(run)
    with pytest.raises(FifaError, match="cannot write: Permission denied"):
        COMMANDS[command](run)
    assert contents(run) == before and not left_behind(run.parent)


def test_images_that_are_kept_to_be_exported_may_fill_the_disk(mount_disk, tmp_path):
    disk = mount_disk("1m")
    make_run(tmp_path)
    recipe = open_run(tmp_path / "run").recipe
    run = shutil.copytree(tmp_path / "run", disk / "run")
    (run / "checked.parquet").unlink()
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 8192))
    with pytest.raises(FifaError, match="cannot write"):
        filter_pairs(recipe, run)
