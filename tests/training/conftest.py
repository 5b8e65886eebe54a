import pytest
from tiny_diffusion import write_model, write_pairs
from trainings import fresh_process


@pytest.fixture(autouse=True)
def _accelerate_is_fresh():
    with fresh_process():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with ``sd15``, a tiny model, and ``pairs.parquet``, four pairs of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "sd15")
    write_pairs(folder / "pairs.parquet")
    return folder


class Models(dict):
    """Folders of tiny models by kind, each written when it is first asked for."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, kind):
        self[kind] = write_model(self.root / kind, kind)
        return self[kind]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`Models` for all tests, which none of them changes."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def one_thread(monkeypatch):
    """Workers have one thread, as this process has: another number changes float32's last bits."""
    monkeypatch.setattr("fifa.shards.pool.cores", lambda: 1)
