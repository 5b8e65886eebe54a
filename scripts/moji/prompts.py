"""What people ask for: the same scene in many wordings, at length, and what is no request."""

from __future__ import annotations

from fifa.moji.world import WORLD, Scene, article, caption

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
