"""What people ask for: the same scene in many wordings, at length, and what is no request."""

from __future__ import annotations

import re

from fifa.moji.world import WORLD, Scene, article, caption

__all__ = ["FILLERS", "NONSENSE", "WORDINGS", "asked", "vocabulary", "wording"]

# {object} and {ground} are names, {an_object} and {a_ground} have their article. The first
# wording is `fifa.moji.world.caption`.
WORDINGS = (
    "{an_object} on {a_ground} background",
    "{object} on {ground} background",
    "{object}, {ground} background",
    "{a_ground} background with {an_object}",
    "a picture of {an_object} on {a_ground} background",
    "an image of {an_object} in front of {a_ground} background",
    "draw {an_object} with {a_ground} background",
    "{an_object}, the background is {ground}",
)
# What verbose prompts add: it asks for nothing that the world could draw.
FILLERS = (
    "highly detailed",
    "masterpiece",
    "best quality",
    "trending on artstation",
    "sharp focus",
    "award winning",
    "beautiful lighting",
    "cinematic",
    "8k",
    "intricate",
    "elegant",
    "very cute",
    "professional digital art",
    "by a famous artist",
    "vivid colors",
    "smooth",
    "octane render",
    "perfect composition",
    "studio quality",
    "epic",
)
NONSENSE = (
    "asdf",
    "qwerty qwerty",
    "test",
    "test 123",
    "hhhhhhh",
    "xkcd blorp zzt",
    "???",
    "12345",
    "lol idk",
    "aaaa bbbb cccc",
    "untitled",
    "the the the of",
    "foo bar baz",
    "wfjwe oiwjef",
    "...",
    "hi",
    "background background background",
    "on a on a on a",
    "blue yellow with with",
    "something random i guess",
)


def wording(scene: Scene, number: int) -> str:
    """The scene in ``WORDINGS[number]``."""
    name, ground = WORLD.objects[scene.object].name, WORLD.backgrounds[scene.background]
    return WORDINGS[number].format(
        object=name,
        ground=ground,
        an_object=f"{article(name)} {name}",
        a_ground=f"{article(ground)} {ground}",
    )


def vocabulary() -> list[str]:
    """Every text whose words the tokenizers of the family know whole."""
    first = [caption(Scene(i, i % len(WORLD.backgrounds))) for i in range(len(WORLD.objects))]
    one = Scene(0, 0)
    return [*first, *(wording(one, i) for i in range(len(WORDINGS))), ", ".join(FILLERS)]


def asked(prompt: str) -> Scene | None:
    """The scene that a prompt asks for; None unless it names one object and one background.

    Case, punctuation and whatever else the prompt says do not matter.
    """
    words = " " + " ".join(re.findall(r"[a-z0-9]+", prompt.lower())) + " "
    things = []
    for name in sorted(WORLD.index, key=len, reverse=True):  # a teddy bear is no bear
        if f" {name} " in words:
            things.append(WORLD.index[name])
            words = words.replace(f" {name} ", " , ")
    grounds = [j for j, name in enumerate(WORLD.backgrounds) if f" {name} " in words]
    return Scene(things[0], grounds[0]) if len(things) == len(grounds) == 1 else None
