"""A few of the lies of ``scripts/attack/models.py``."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts" / "attack"


def test_model_files_that_lie_are_told_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    import models

    monkeypatch.setattr(models, "KINDS", ("sd15", "sd3"))
    found = models.attack(16, 5, tmp_path)
    assert len(found) == 32
    assert [one for one in found if one[2] not in ("told", "loads")] == []
    assert sum(result == "told" for *_, result in found) > 16
