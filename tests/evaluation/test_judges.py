import colorsys
import json

import numpy as np
import pytest
import torch
from drawn import draw_images, draw_index, picture
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from fifa.errors import FifaError
from fifa.evaluation.judges import Judge, as_judges, colours, each_image, load_detector
from fifa.models.runtime import Runtime


def write_detector(folder, labels=("normal", "nsfw", "gore"), problem=None):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
        with torch.no_grad():
            model.classifier.weight.mul_(6)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def drawn(n=5):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (40, 30, 3), np.uint8)) for _ in range(n)]


def test_colours_are_what_a_loop_over_pixels_says():
    images = [*drawn(2), picture("black"), picture("white"), picture((200, 100, 0))]
    found = colours([""] * len(images), images)
    for i, image in enumerate(images):
        pixels = [image.getpixel((x, y)) for x in range(image.width) for y in range(image.height)]
        luma = [(0.2126 * r + 0.7152 * g + 0.0722 * b) / 255 for r, g, b in pixels]
        saturation = [colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[1] for rgb in pixels]
        assert found["brightness"][i] == pytest.approx(np.mean(luma), abs=1e-5)
        assert found["contrast"][i] == pytest.approx(np.std(luma), abs=1e-5)
        assert found["saturation"][i] == pytest.approx(np.mean(saturation), abs=1e-5)


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_detector_is_the_model_that_transformers_loads(tmp_path, problem):
    folder = write_detector(tmp_path, problem=problem)
    images = drawn(20)
    detector = load_detector(str(folder), ["NSFW", "gore"], Runtime())
    found = detector.measure([""] * 20, images)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits.numpy().astype(np.float64)
    if problem:
        expected = (1 / (1 + np.exp(-logits[:, 1:]))).max(1)
    else:
        expected = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1:].sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.01
    assert detector.type == "unsafe"
    assert "nsfw" in detector.scale
    half = load_detector(str(folder), ["NSFW", "gore"], Runtime("cpu", "bfloat16"))
    assert half.identity != detector.identity


def test_a_detector_goes_on_with_fewer_images_once_memory_has_run_out(tmp_path, capsys):
    folder = write_detector(tmp_path)
    sizes = []

    class Short(Runtime):
        def pixels(self, pixels):
            sizes.append(len(pixels))
            if len(pixels) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().pixels(pixels)

    short, whole = (load_detector(str(folder), ["nsfw"], kind()) for kind in (Short, Runtime))
    images = drawn(20)
    found = short.measure([""] * 20, images)
    np.testing.assert_allclose(found, whole.measure([""] * 20, images), atol=1e-6)
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    assert "4 images at a time" in capsys.readouterr().err
    short.measure([""] * 4, images[:4])
    assert sizes[7:] == [4]
    assert short.measure([], []).shape == (0,)


def test_a_detector_needs_labels_that_it_has(tmp_path):
    folder = write_detector(tmp_path / "vit")
    with pytest.raises(FifaError, match="no label weapon") as told:
        load_detector(str(folder), ["weapon"], Runtime())
    assert "normal, nsfw, gore" in str(told.value)
    with pytest.raises(FifaError, match="no unsafe labels"):
        load_detector(str(folder), [], Runtime())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FifaError, match="cannot load the detector"):
        load_detector(str(tmp_path / "empty"), ["nsfw"], Runtime())


def test_judges_by_name():
    judges = as_judges({"red": lambda prompts, images: np.zeros(len(images)), "b": Judge("c", len)})
    assert [judge.name for judge in judges] == ["red", "c"]
    with pytest.raises(FifaError, match="same name"):
        as_judges([Judge("a", len), Judge("a", len)])


def test_what_was_said_of_an_image_is_kept(tmp_path):
    index = draw_images(draw_index(["base"], prompts=30), tmp_path)
    asked = []

    def look(prompts, images):
        asked.append(len(images))
        return {"red": [np.asarray(image)[..., 0].mean() for image in images]}

    scores = tmp_path / "scores"
    first = each_image(index, tmp_path, scores, "judge", "red", 1, look)
    again = each_image(index, tmp_path, scores, "judge", "red", 1, look)
    assert asked == [64, 26]
    assert first.equals(again)
    files = index["file"].to_pylist()
    expected = [np.asarray(Image.open(tmp_path / f))[..., 0].mean() for f in files]
    np.testing.assert_allclose(first["red"].to_numpy(), expected, rtol=1e-6)
    each_image(index, tmp_path, scores, "judge", "red", 2, look)
    assert asked == [64, 26, 64, 26]


def test_a_judge_has_to_say_one_number_an_image(tmp_path):
    index = draw_images(draw_index(["base"], prompts=2), tmp_path)
    with pytest.raises(FifaError, match="one number per image"):
        each_image(index, tmp_path, tmp_path, "judge", "x", 1, lambda p, i: {"x": [1.0]})


def test_a_missing_image_is_told(tmp_path):
    index = draw_images(draw_index(["base"], prompts=2), tmp_path)
    (tmp_path / index["file"][3].as_py()).write_bytes(b"not an image")
    with pytest.raises(FifaError, match="cannot open a generated image"):
        each_image(index, tmp_path, tmp_path, "looks", "pixels", 1, colours)
