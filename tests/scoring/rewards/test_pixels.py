import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import drawing, images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fifa.data.decode import BadImage
from fifa.scoring.rewards.pixels import (
    MEAN,
    STD,
    convert_crop,
    crop_convert,
    fit_area,
    pad,
    standardise,
)


@pytest.mark.parametrize("image", images(), ids=lambda im: f"{im.mode}-{im.width}x{im.height}")
def test_convert_crop_is_the_processor_of_transformers_to_the_bit(image):
    # transformers 5 would put white behind transparency; 4, which the models were made with,
    # converted to RGB
    opaque = Image.fromarray(np.asarray(image.convert("RGB")))
    theirs = CLIPImageProcessorPil()(opaque, return_tensors="np")["pixel_values"]
    ours = standardise(torch.from_numpy(convert_crop(image, 224))[None])
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("image", images(), ids=lambda im: f"{im.mode}-{im.width}x{im.height}")
def test_crop_convert_is_torchvisions_resize_crop_convert_on_pillow_to_the_bit(image):
    # torchvision's Resize(224), CenterCrop(224), convert("RGB"), ToTensor, Normalize
    w, h = image.size
    new = (224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224)
    resized = image.resize(new, Image.BICUBIC)
    top, left = int(round((new[1] - 224) / 2.0)), int(round((new[0] - 224) / 2.0))  # noqa: RUF046
    cropped = resized.crop((left, top, left + 224, top + 224)).convert("RGB")
    unit = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous().float().div(255)
    theirs = unit.sub(torch.tensor(MEAN).view(-1, 1, 1)).div(torch.tensor(STD).view(-1, 1, 1))
    ours = standardise(torch.from_numpy(crop_convert(image, 224))[None])[0]
    assert torch.equal(ours, theirs)


def test_the_two_crops_round_differently():
    image = drawing(0, 224, 227)  # 3 rows too many: 3 // 2 = 1, round(1.5) = 2
    assert np.array_equal(convert_crop(image, 224)[:, 1:], crop_convert(image, 224)[:, :-1])


@pytest.mark.parametrize(
    "size", [(300, 250), (97, 331), (60, 40), (224, 100), (224, 224), (9, 900)]
)
def test_pad_resizes_floats_and_centres_them_on_black(size):
    image = drawing(1, *size)
    w, h = size
    scale = 224 / max(w, h)
    unit = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if scale != 1:
        new = (round(h * scale), round(w * scale))
        unit = torch.nn.functional.interpolate(unit, new, mode="bicubic", antialias=True)
    h, w = unit.shape[2:]
    theirs = np.zeros((3, 224, 224), np.float32)
    top, left = (224 - h) // 2, (224 - w) // 2
    theirs[:, top : top + h, left : left + w] = unit[0].numpy()
    ours = pad(image, 224)
    assert np.array_equal(ours, theirs)
    assert torch.allclose(
        standardise(torch.from_numpy(ours)[None])[0],
        (torch.from_numpy(theirs) - torch.tensor(MEAN).view(3, 1, 1))
        / torch.tensor(STD).view(3, 1, 1),
    )


def test_pad_is_pillows_bicubic_on_floats():
    unit = np.asarray(drawing(2, 300, 500), np.float32) / 255
    channels = [
        np.asarray(Image.fromarray(unit[:, :, c]).resize((134, 224), Image.BICUBIC))
        for c in range(3)
    ]
    ours = pad(drawing(2, 300, 500), 224)[:, :, 45:179]
    assert np.abs(ours - np.stack(channels)).max() < 2e-5


@pytest.mark.parametrize(
    "size", [(300, 250), (1024, 1024), (97, 331), (30, 20), (448, 448), (7, 900)]
)
def test_fit_area_has_the_size_of_qwens_smart_resize(size):
    image, area = drawing(3, *size), 256 * 28 * 28
    h, w = smart_resize(size[1], size[0], 28, min_pixels=area, max_pixels=area)
    theirs = np.asarray(image.resize((w, h), Image.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(fit_area(image, area=area, factor=28), theirs)


def test_a_sliver_is_refused_where_the_original_refuses_it():
    with pytest.raises(BadImage, match="200 times"):
        fit_area(Image.new("RGB", (2010, 10)), area=256 * 784, factor=28)


@pytest.mark.parametrize("crop", [convert_crop, crop_convert])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1), (150_000, 3)])
def test_a_sliver_costs_no_more_than_its_crop(crop, size):
    columns = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0])
    out = crop(Image.fromarray(columns), 224)
    assert out.shape == (3, 224, 224)


def test_the_crop_of_a_sliver_is_what_resizing_all_of_it_would_give(monkeypatch):
    image = drawing(4, 3000, 10)
    whole = convert_crop(image, 224)
    monkeypatch.setattr("fifa.scoring.rewards.pixels.MAX_RESIZED", 1000)
    part = convert_crop(image, 224)
    assert np.abs(whole.astype(int) - part).max() <= 1


def test_orientation_is_left_as_it_is():
    image = drawing(5, 300, 250)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    for function in (convert_crop, crop_convert, pad):
        assert np.array_equal(function(image, 224), function(turned, 224))


def test_every_byte_is_standardised_as_numpy_does_it():
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.broadcast_to(ramp, (3, 1, 256)).copy()
    unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    assert np.array_equal(
        standardise(torch.from_numpy(pixels)[None])[0].numpy(), (unit - mean) / std
    )
