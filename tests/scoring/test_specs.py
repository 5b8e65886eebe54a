"""Specs: what may be said, what it means, and what is said of the rest."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from fifa.errors import FifaError
from fifa.scoring.specs import ENCODERS, IMAGE_ENCODERS, RATERS, REWARDS, Registry

ALL = (REWARDS, RATERS, ENCODERS, IMAGE_ENCODERS)


@pytest.mark.parametrize(
    ("registry", "text", "name", "model", "at"),
    [
        (REWARDS, "pickscore", "pickscore", "", ""),
        (REWARDS, "hpsv2.1:./a:b@c", "hpsv2.1", "./a:b@c", ""),
        (REWARDS, "column:raw:a,b", "column", "raw:a,b", ""),
        (REWARDS, "proxy@clip:org/m", "proxy", "", "clip:org/m"),
        (REWARDS, "proxy:out/reward", "proxy", "out/reward", ""),
        (RATERS, "openai:org/m:7b@q4@https://h:1/v1", "openai", "org/m:7b@q4", "https://h:1/v1"),
        (RATERS, "local:./m@http://", "local", "./m@http://", ""),
        (ENCODERS, "column:of vectors", "column", "of vectors", ""),
        (IMAGE_ENCODERS, "efficientnet-lite0:384", "efficientnet-lite0", "384", ""),
    ],
)
def test_a_spec_is_taken_apart(
    registry: Registry, text: str, name: str, model: str, at: str
) -> None:
    spec = registry.parse(text)
    assert (spec.text, spec.name, spec.model, spec.at) == (text, name, model, at)


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.role)
@pytest.mark.parametrize("text", ["", "magic", "clip", "clip:", "pickscore:", "proxy@", "minilm:x"])
def test_what_names_nothing_is_refused_with_all_that_is_there(
    registry: Registry, text: str
) -> None:
    with pytest.raises(FifaError, match=f"no such {registry.role}") as caught:
        registry.parse(text)
    for entry in registry.entries:
        assert entry.form in str(caught.value)


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.role)
def test_every_name_has_what_makes_it(registry: Registry) -> None:
    for entry in registry.entries:
        assert registry.parse(entry.form.replace("[", "").replace("]", "")).entry == entry or (
            "URL" in entry.form
        )
        module, _, maker = entry.maker.partition(":")
        if module:
            assert callable(getattr(import_module(f"fifa.scoring.{module}"), maker))


def test_only_what_looks_at_no_image_or_is_trained_here_has_nothing_that_makes_it() -> None:
    unmade = [e.form for registry in ALL for e in registry.entries if not e.maker]
    assert unmade == [
        "column:NAME_0,NAME_1",
        "arena",
        "arena:names",
        "proxy",
        "proxy@ENCODER",
        "column:NAME",
        "column:NAME",
    ]
    assert REWARDS.parse("proxy").trained_here
    assert REWARDS.parse("proxy@clip:m").trained_here
    assert not REWARDS.parse("proxy:folder").trained_here


def test_the_names_take_no_model_library() -> None:
    import subprocess

    code = (
        "import sys, fifa.scoring.specs; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
