import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def shipped():
    """The 360 pairs that the package ships."""
    return ROOT / "src" / "fifa" / "demo" / "pairs.parquet"


@pytest.fixture(scope="session")
def real_data():
    """Real feedback that nobody on this project made; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return folder
