"""Conditional writes and folders on servers that speak S3's and Google Cloud Storage's protocols.

They need s3fs and moto[server], gcsfs and gcp-storage-emulator, and are skipped without them; what
does not depend on a server is in test_mirror.py. Google's emulator keeps no conditions by itself.
"""

import logging
from http import HTTPStatus

import pyarrow as pa
import pytest

from attack.stores import Proxy
from fifa.errors import FifaError
from fifa.shards import claim, lock, stores
from fifa.shards.ledger import Ledger
from fifa.shards.mirror import local, mirrored

pytestmark = pytest.mark.filterwarnings("default")  # of clients that are not this project's


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def gcs():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    server.start()
    yield f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    server.stop()


@pytest.fixture
def on_s3(s3, monkeypatch):
    import s3fs

    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    settings = dict.fromkeys(names, "x") | {"AWS_DEFAULT_REGION": "us-east-1"}

    def on(endpoint):
        for name, value in (settings | {"AWS_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    on(s3)
    system = s3fs.S3FileSystem()
    if not system.exists("runs"):
        system.mkdir("runs")
    yield on
    s3fs.S3FileSystem.clear_instance_cache()


def conditions_kept(monkeypatch):
    """Let Google's emulator refuse what the real service refuses."""
    from gcp_storage_emulator.handlers import objects

    upload = objects._media_upload

    def careful(request, response, storage):
        wanted = request.query.get("ifGenerationMatch", [None])[0]
        try:
            name = request.params["bucket_name"], request.query["name"][0]
            there = storage.get_file_obj(*name)["generation"]
        except objects.NotFound:
            there = "0"
        if wanted is not None and wanted != there:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        return upload(request, response, storage)

    monkeypatch.setattr(objects, "_media_upload", careful)


@pytest.fixture
def on_gcs(gcs, monkeypatch):
    import gcsfs

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(params=["s3", "gs"])
def url(request, tmp_path, monkeypatch):
    """A folder's URL in a store that keeps conditions."""
    request.getfixturevalue("on_s3" if request.param == "s3" else "on_gcs")
    if request.param == "gs":
        conditions_kept(monkeypatch)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(claim, "LOOK", 0.05)
    return f"{request.param}://runs/{tmp_path.name}"


def test_an_object_is_written_only_over_the_version_that_was_seen(url):
    name = f"{url}/object"
    assert stores.read_object(name) is None
    first = stores.write_object(name, b"1", "")
    assert stores.read_object(name) == (b"1", first)
    assert stores.write_object(name, b"2", "") is None
    second = stores.write_object(name, b"2", first)
    assert second not in (None, first)
    assert stores.write_object(name, b"3", first) is None
    assert stores.write_object(name, b"2", first) == second  # its answer was lost
    assert stores.write_object(f"{url}/other", b"3", first) is None
    assert stores.read_object(name) == (b"2", second)


def test_a_bucket_that_is_not_there_is_named(url):
    scheme = url.partition(":")[0]
    with pytest.raises(FifaError, match="cannot write") as told:
        stores.write_object(f"{scheme}://none-of-them/a/b", b"1", "")
    assert told.value.do == "make the bucket first, or check its name"


def test_a_folder_goes_there_and_comes_back(url, tmp_path, monkeypatch):
    with mirrored(url) as folder:
        (folder / "b").mkdir(parents=True)
        (folder / "a").write_bytes(b"1")
        (folder / "b" / "c d+é").write_bytes(b"2" * 10**6)
        with pytest.raises(FifaError, match="is writing here"):
            monkeypatch.setattr(claim, "machine", lambda: "another")
            claim.Claim(url)
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "elsewhere"))
    with mirrored(url) as folder:
        assert (folder / "b" / "c d+é").read_bytes() == b"2" * 10**6
        (folder / "a").unlink()
        (folder / "b" / "c d+é").write_bytes(b"3")
    system, path = stores.open_store(url)
    system.invalidate_cache()
    names = {name.removeprefix(f"{path}/") for name in system.find(path)}
    assert names == {".fifa-index", ".fifa-lock", "b/c d+é"}
    assert system.cat_file(f"{path}/b/c d+é") == b"3"
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "a third one"))
    assert (local(url) / "b" / "c d+é").read_bytes() == b"3"
    assert local(f"{url}/b/c d+é").read_bytes() == b"3"


def test_a_store_without_conditions_is_refused(on_gcs, tmp_path):
    with pytest.raises(FifaError, match="ignores conditions"):
        claim.Claim(f"gs://runs/{tmp_path.name}")


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_fail_are_made_again(s3, on_s3, tmp_path, monkeypatch, seed):
    proxy = Proxy(s3, 0.1, seed)
    on_s3(proxy.url)
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    url = f"s3://runs/{tmp_path.name}"
    for number in range(3):
        with mirrored(url) as folder:
            folder.mkdir(exist_ok=True)
            for name in range(20):
                (folder / f"{name}").write_text(f"{name * number}")
    ledger = Ledger(f"{url}/shards")
    for name in range(10):
        ledger.write(f"{name}", pa.table({"n": [name]}))
    assert ledger.keys() == {f"{name}" for name in range(10)}
    assert ledger.read("3") == pa.table({"n": [3]})
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "elsewhere"))
    assert {path.name: path.read_text() for path in local(url).iterdir() if path.is_file()} == {
        f"{name}": f"{name * 2}" for name in range(20)
    }
    ledger.forget()
    assert ledger.keys() == frozenset()
    assert len([what for what in proxy.seen if what not in ("requests", "passed")]) >= 3
    proxy.shutdown()
    proxy.server_close()
