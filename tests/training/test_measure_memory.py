"""The script that measures memory: it runs here too, tiny, and its rows are the families'."""

import json

import pytest
import torch

from fifa.models.families import FAMILIES
from measure_memory import PUBLISHED, line, made_on, main, measure_denoiser, taken

CPU = torch.device("cpu")


def test_two_points_make_a_line_and_what_did_not_fit_is_none():
    assert line([(1, 999), (4, 5000), (8, 9000)]) == (1000, 1000)
    assert line([(1, 999), (4, 5000), (8, None)]) == (0, 1334)
    assert line([(4, 5000), (8, None)]) == (0, 1250)
    assert line([(4, None), (8, None)]) is None


def test_what_is_kept_for_the_backward_pass_is_counted():
    weight = torch.ones(10, 10, requires_grad=True)
    given = torch.ones(4, 10)
    assert taken(lambda: (given @ weight).sum().backward(), CPU) == 4 * 40  # the factor


def test_without_cuda_it_says_so_and_runs_tiny(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["measure_memory.py", "--family", "sd"])
    main()
    told = capsys.readouterr().out
    assert "no CUDA device here" in told
    found = json.loads(told.splitlines()[-1])
    assert found["sd"]["pair"][1] > found["sd"]["pair_checkpointed"][1] > 0
    assert "sd: Activations(numbers=" in told


MEASURED = [family for family in FAMILIES if family.activations]


@pytest.mark.parametrize("family", MEASURED, ids=lambda family: family.name)
def test_a_published_denoiser_has_the_numbers_of_the_families_row(family):
    import diffusers

    with made_on("meta"):
        denoiser = getattr(diffusers, family.denoiser)(**PUBLISHED[family.name].denoiser)
    assert sum(p.numel() for p in denoiser.parameters()) == family.activations.numbers


def test_the_others_run_tiny():
    for family in FAMILIES:
        if family.name in PUBLISHED and not family.activations:
            found = measure_denoiser(family, CPU)
            assert found["pair"][1] > found["pair_checkpointed"][1] > 0
