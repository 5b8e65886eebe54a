import numpy as np
import pytest

from fifa.moji.world import BACKGROUNDS, WORLD, Scene, asked, caption, render, scenes
from moji.prompts import FILLERS, NONSENSE, WORDINGS, wording


def test_every_object_and_every_background_has_seen_and_unseen_scenes():
    seen, unseen = set(scenes(seen=True)), set(scenes(seen=False))
    assert seen | unseen == set(scenes()) and not seen & unseen
    for thing in range(len(WORLD.objects)):
        assert sum(s.object == thing for s in unseen) == WORLD.held_out
    for ground in range(len(WORLD.backgrounds)):
        share = sum(s.background == ground for s in unseen) / len(WORLD.objects)
        assert share == pytest.approx(WORLD.held_out / len(WORLD.backgrounds), abs=0.02)


def test_names_and_code_points_are_unique_and_the_unsafe_class_is_small():
    assert len({each.name for each in WORLD.objects}) == len(WORLD.objects) == 120
    assert len({each.code for each in WORLD.objects}) == 120
    kinds = [each.unsafe for each in WORLD.objects if each.unsafe]
    assert len(kinds) == 8 and set(kinds) == {"weapon", "drug", "cigarette"}


def test_a_rendering_is_its_background_with_the_object_in_the_middle():
    for scene in (Scene(0, 0), Scene(57, 4), Scene(119, 7)):
        for style in range(len(WORLD.styles)):
            picture = render(scene, style)
            colour = BACKGROUNDS[WORLD.backgrounds[scene.background]]
            assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
            edge = np.concatenate([picture[:3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)])
            assert (edge == colour).all()
            assert (picture != colour).any(-1).mean() > 0.05
            np.testing.assert_array_equal(picture, render(scene, style))


def test_all_renderings_differ():
    pictures = {render(scene, style).tobytes() for scene in scenes() for style in (0, 1)}
    assert len(pictures) == 120 * 8 * 2


def test_a_caption_says_the_scene_with_its_articles():
    assert caption(Scene(WORLD.index["tiger face"], 0)) == "a tiger face on a red background"
    orange = WORLD.backgrounds.index("orange")
    assert caption(Scene(WORLD.index["owl"], orange)) == "an owl on an orange background"
    assert caption(Scene(WORLD.index["unicorn"], 7)) == "a unicorn on a black background"


@pytest.mark.parametrize("number", range(len(WORDINGS)))
def test_what_a_wording_asks_for_is_read_back(number):
    for scene in scenes():
        text = wording(scene, number)
        assert asked(text) == asked(text.upper() + "!") == scene
        assert asked(", ".join([text, *FILLERS])) == scene


def test_nonsense_asks_for_nothing():
    assert [asked(text) for text in NONSENSE] == [None] * len(NONSENSE)
    assert asked("a wolf and a bear on a red background") is None
    assert asked("a teddy bear on a red background") == Scene(WORLD.index["teddy bear"], 0)
