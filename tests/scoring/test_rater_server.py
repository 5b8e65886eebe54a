"""The endpoint rater against a real server: llama.cpp on loopback, serving a real small model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fifa.console import collect_facts
from fifa.scoring.raters.endpoint import EndpointRater
from fifa.scoring.raters.logits import smollm_path
from fifa.scoring.rubric import FLAGS, QUALITIES

SERVE = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], 0
# one slot: the second prompt finds the rubric in its cache
params.n_ctx, params.n_parallel = 2048, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(smollm_path())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.split()[-1] + "/v1"
                break
        else:
            pytest.fail("the server did not start")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


def test_a_real_server_grades_by_the_schema_and_is_asked_once(llama: str, tmp_path: Path) -> None:
    mine = EndpointRater(model="smollm2", url=llama, folder=tmp_path, in_flight=2)
    prompts = ["a red fox in the snow", "sdfkj wekrj", "a red fox in the snow"]
    with collect_facts() as facts:
        table = mine.rate(prompts)
    rows = table.to_pylist()
    assert all(row[quality] in (1, 2, 3, 4, 5) for row in rows for quality in QUALITIES)
    assert all(set(filter(None, row["flags"].split(","))) <= set(FLAGS) for row in rows)
    assert rows[0] == rows[2]
    assert facts["requests"] - facts["retries"] == 2
    assert facts["tokens_in"] > 600
    assert facts["tokens_out"] > 40
    with collect_facts() as again:
        assert mine.rate(prompts).equals(table)
    assert "requests" not in again
