import json
import sys

import pytest

from commands import fifa
from fifa.run import doctor
from fifa.run.doctor import Probe, package_checks, probed, torch_checks

CARD = {"name": "H100", "capability": [9, 0], "free": 70e9, "total": 80e9}
TORCH = {
    **{"version": "2.13.0+cu130", "built": "13.0", "works": True, "cudnn": 91000},
    **{"cudnn_attention": True, "devices": [CARD], "mps": False},
}


def states(checks):
    return {check.name: check.state for check in checks}


def test_an_import_that_ends_its_process_is_told_and_the_others_are_tried(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)")
    (tmp_path / "old.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    (tmp_path / "well.py").write_text("print('a library that talks')")
    path = [str(tmp_path), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    found = probed(["dies", "old", "well"])
    assert sorted(found.failed) == ["dies", "old"]
    assert "(7)" in found.failed["dies"]
    told = {check.name: check for check in package_checks(found)}
    assert told["import old"].do == "old was built for NumPy 1: pip install --upgrade old"
    assert told["core"].state == "ok"


@pytest.mark.parametrize(
    ("changed", "driver", "wanted", "name", "state"),
    [
        ({}, "H100, 580", "2.13.0", "torch", "ok"),
        ({}, "H100, 580", "", "cuDNN attention", "note"),
        ({"built": None, "works": False, "devices": []}, "H100, 580", "", "torch", "bad"),
        ({"works": False, "devices": []}, "H100, 470", "", "torch", "bad"),
        ({"built": None, "works": False, "devices": []}, "", "2.9.1", "torchvision", "bad"),
        ({"devices": [{**CARD, "capability": [7, 5]}]}, "T4, 580", "", "GPU 0", "note"),
    ],
)
def test_what_is_known_not_to_work_is_told(changed, driver, wanted, name, state):
    checks = list(torch_checks(TORCH | changed, driver, wanted))
    assert states(checks)[name] == state
    assert all(check.do for check in checks if check.state != "ok")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "probed", lambda modules: Probe({"x": "no"}, TORCH))
    done = fifa("doctor", tmp_path, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["bad"] == sum(check["state"] == "bad" for check in found["checks"])
    assert {"fifa", "disk", "core", "extra train", "import x"} <= {
        c["name"] for c in found["checks"]
    }
    assert list(tmp_path.iterdir()) == []
    assert "bad   import x" in fifa("doctor", tmp_path).stdout
