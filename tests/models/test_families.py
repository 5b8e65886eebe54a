"""The rows of the families, against diffusers' own classes and the texts made from them."""

import json
import re
from importlib import import_module
from inspect import signature
from pathlib import Path

import diffusers
import pytest

from fifa.models.families import FAMILIES, PIPELINES, Family, listed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_is_as_diffusers_has_it(family):
    assert PIPELINES[family.pipeline] is family
    pipeline = getattr(diffusers, family.pipeline)
    parts = signature(pipeline.__init__).parameters
    assert set(family.parts) | set(family.optional) <= set(parts)
    assert parts[family.part].annotation.__name__ == family.denoiser
    defaults = signature(pipeline.__call__).parameters
    assert defaults["num_inference_steps"].default == family.steps
    assert defaults[family.guide].default == family.guidance
    module = import_module(f"fifa.training.backbones.{family.name}")
    assert getattr(module, family.backbone).__module__ == module.__name__


def test_a_distilled_model_is_sampled_in_few_steps_without_guidance(tmp_path):
    for title, settings, expected in (
        ("FLUX", {"guidance_embeds": True}, (28, 3.5)),
        ("FLUX", {"guidance_embeds": False}, (4, 0.0)),
        ("FLUX", {}, (4, 0.0)),
        ("Z-Image", {"shift": 6.0}, (50, 5.0)),
        ("Z-Image", {"shift": 3.0}, (8, 0.0)),
        ("FLUX.2 klein", {"is_distilled": True}, (4, 0.0)),
        ("FLUX.2 klein", {"is_distilled": False}, (50, 4.0)),
        ("SD", {}, (50, 7.5)),
    ):
        [family] = [one for one in FAMILIES if one.title == title]
        if family.distilled:
            path = tmp_path / family.distilled.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(settings))
        assert family.sampling(tmp_path) == expected


def test_the_guide_says_what_the_rows_say():
    guide = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    for family in FAMILIES:
        assert f"| {family.title} | {family.steps} | {family.guidance:g} |" in guide
        if family.distilled:
            assert f"| {family.distilled.title} | {family.distilled.steps} | 0 |" in guide
    table = (ROOT / "docs" / "families.md").read_text("utf-8")
    for family in (one for one in FAMILIES if one.since != Family.since):
        assert re.search(rf"^\| `{family.pipeline}` .* \| {family.since} \|$", table, re.M)


def test_help_texts_say_what_the_rows_say():
    steps, guidance = listed("steps"), listed("guidance")
    assert steps.startswith("50 for SD, SDXL")
    assert "28 for SD3 and FLUX, " in steps and "4 for FLUX schnell" in steps
    assert guidance.startswith("7.5 for SD, 5 for SDXL")
    assert ", bfloat16 for SD3, FLUX" in listed("half")
