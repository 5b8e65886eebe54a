"""What a device decides: precision, sizes of batches, and what happens when its memory ends."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import PROMPTS, images, write_clip

from fifa.config import Compute, Reward
from fifa.data.images import file_images
from fifa.errors import FifaError
from fifa.models import runtime, transformer
from fifa.models.runtime import Runtime
from fifa.scoring import encoders
from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters import logits
from fifa.scoring.raters.local import LogitRater
from fifa.scoring.rewards import clip as clip_module
from fifa.scoring.rewards import features, finetune, fit, load_reward, score
from fifa.scoring.rewards.features import image_features
from fifa.scoring.rewards.image_encoders import make_image_encoder
from fifa.scoring.rewards.worker import images_at_a_time

MANY = ["a cat", "two dogs on a beach, oil painting", "x", "a very red fox in the snow", "sky"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    write_clip(folder)
    return folder


@pytest.fixture
def fast(monkeypatch):
    """Every device has bfloat16, as a GPU."""
    for module in (runtime, transformer, clip_module):
        monkeypatch.setattr(module, "best_dtype", lambda device: "bfloat16")


def limited(function, most):
    """``function`` of a batch, for which only ``most`` rows fit into memory."""
    sizes = []

    def call(*arguments, **named):
        rows = len(next(x for x in [*arguments, *named.values()] if hasattr(x, "__len__")))
        if rows > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(rows)
        return function(*arguments, **named)

    call.sizes = sizes
    return call


def test_a_batch_is_what_is_useful_on_the_device():
    assert images_at_a_time(Compute(), "cpu") == 32
    assert images_at_a_time(Compute(), "cuda:1") == 128
    assert images_at_a_time(Compute(batch=7), "cuda") == 7


def test_without_bfloat16_everything_is_in_float32(clip):
    model = load_reward(f"pickscore:{clip}", device="cpu")
    assert model.runtime.dtype == model.identity["dtype"] == "float32"
    assert "text" not in model.identity  # as it was before there were devices
    assert make_encoder(f"clip:{clip}", device="cpu").precision == "float32"


def test_published_models_compute_in_the_fastest_precision(clip, fast):
    model = load_reward(f"pickscore:{clip}", device="cpu")
    encoder = make_encoder(f"clip:{clip}", device="cpu")
    assert model.identity["dtype"] == model.identity["text"] == encoder.precision == "bfloat16"
    vectors = model.prompt_features(PROMPTS).numpy()
    assert np.array_equal(vectors, encoder.embed(PROMPTS))  # found again by the diversity step
    exact = load_reward(f"pickscore:{clip}", device="cpu", dtype="float32")
    assert exact.identity["dtype"] == "float32" and "text" not in exact.identity
    error = np.abs(vectors - exact.prompt_features(PROMPTS).numpy()).max()
    assert 0 < error < 0.02


def test_raters_compute_in_halves_and_are_named_by_it(monkeypatch):
    for native, expected in (("bfloat16", "bfloat16"), ("float32", "float16")):
        monkeypatch.setattr(logits, "best_dtype", {"cuda:0": native}.get)
        assert logits.precision("cuda:0") == ("cuda:0", expected)
    one, other = (LogitRater(dtype=dtype).identity for dtype in ("float32", "bfloat16"))
    assert one != other


class Pairs:
    """As much of a data set as its identity takes."""

    pairs_digest = "digest"
    table = {"label": pa.chunked_array([[1.0]])}  # noqa: RUF012

    class origin:  # noqa: N801
        fingerprint = "source"


def test_what_a_head_was_trained_on_stays_in_float32(fast, monkeypatch):
    assert make_encoder("minilm", device="cpu").precision == "float32"
    asked = []
    monkeypatch.setattr(fit, "make_runtime", lambda *how: asked.append(how) or Runtime())
    fit._identity(Pairs, Reward(), 2, 0)
    assert asked == [(None, "float32")]


def test_a_cross_fitted_clip_is_named_by_the_precision_it_learns_in(clip, monkeypatch):
    def named(device, **options):
        monkeypatch.setattr(fit, "make_runtime", lambda _, dtype: Runtime(device, dtype))
        return fit._identity(Pairs, Reward(base=str(clip), **options), 2, 0)

    assert named("cuda") != named("cpu")  # products are in TF32 there
    assert named("cuda", bf16=True) == named("cpu", bf16=True)


def test_half_precision_is_laid_out_once_and_changes_no_number(clip):
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(288),
        torch.nn.Linear(288, 4),
    ).requires_grad_(False)
    x = torch.randn(5, 3, 8, 8)
    half = Runtime("cpu", "bfloat16")
    with half.autocast():
        expected = layers(x)
    placed = half.place(layers)
    assert placed[0].weight.dtype == placed[3].bias.dtype == torch.bfloat16
    assert placed[2].weight.dtype == torch.float32
    with half.autocast():
        assert torch.equal(placed(x), expected)


def test_a_tower_in_half_precision_as_a_whole_is_as_good(clip):
    exact = load_reward(f"pickscore:{clip}", device="cpu")
    half = load_reward(f"pickscore:{clip}", device="cpu", dtype="bfloat16")
    half._images._weights = "bfloat16"  # as on CUDA
    pixels = torch.from_numpy(np.stack([exact.preprocess(image) for image in images()[:6]]))
    error = (half.image_features(pixels) - exact.image_features(pixels)).norm(dim=-1)
    assert half._images._model.dtype == torch.bfloat16
    assert 0 < error.max() < 0.03


def test_memory_that_ends_halves_the_pictures_of_a_few(clip, monkeypatch, capsys):
    model = load_reward(f"pickscore:{clip}", device="cpu")
    pictures, prompts = images()[:5], PROMPTS[:5]
    expected = score(model, prompts, pictures)
    monkeypatch.setattr(model, "image_features", limited(model.image_features, 2))
    np.testing.assert_allclose(score(model, prompts, pictures), expected, rtol=1e-5)
    assert "2 images at a time" in capsys.readouterr().err
    monkeypatch.setattr(model, "image_features", limited(model.image_features, 0))
    with pytest.raises(FifaError, match="single image"):
        score(model, prompts, pictures)


def test_features_are_read_back_once_a_shard_and_pinned_in_a_thread(tmp_path, monkeypatch):
    for number in range(20):
        images()[number % 5].convert("RGB").resize((40 + number, 40)).save(
            tmp_path / f"{number}.png"
        )
    files = file_images(tmp_path, [f"{number}.png" for number in range(20)])
    encoder, events, cpu = (
        make_image_encoder("efficientnet-lite0:224", Runtime()),
        [],
        torch.Tensor.cpu,
    )

    def pin(tensor, device):
        events.append(threading.current_thread() is threading.main_thread())
        return tensor

    def read(tensor):
        events.append("read")
        return cpu(tensor)

    monkeypatch.setattr(features, "pinned", pin)
    monkeypatch.setattr(torch.Tensor, "cpu", read)
    image_features(files, encoder)
    assert events == [False, False, False, "read"]  # 8, 8 and 4 images


def test_memory_that_ends_halves_the_images_of_an_encoder(tmp_path, capsys):
    for number, image in enumerate(images()[:5]):
        image.convert("RGB").save(tmp_path / f"{number}.png")
    files = file_images(tmp_path, [f"{number}.png" for number in range(5)])
    expected, _ = image_features(files, make_image_encoder("efficientnet-lite0:32", Runtime()))
    encoder = make_image_encoder("efficientnet-lite0:32", Runtime())
    few = limited(encoder.embed, 2)
    encoder.embed = few
    found, _ = image_features(files, encoder)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert max(few.sizes) == 2 and "2 images at a time" in capsys.readouterr().err


def test_memory_that_ends_halves_the_prompts_of_an_encoder(clip, monkeypatch, capsys):
    encoder = make_encoder(f"clip:{clip}", device="cpu")
    expected = encoder.embed(MANY)
    real = transformer.ModelEncoder._forward
    few = limited(lambda tokens, model, *rest: real(encoder, model, tokens, *rest), 2)
    monkeypatch.setattr(
        transformer.ModelEncoder,
        "_forward",
        lambda self, model, tokens, *rest: few(tokens, model, *rest),
    )
    np.testing.assert_allclose(encoder.embed(MANY), expected, atol=1e-6)
    assert max(few.sizes) == 2
    assert "2 prompts at a time" in capsys.readouterr().err


def test_memory_that_ends_in_a_fine_tuning_halves_what_is_judged_from_then_on(capsys):
    states = np.arange(24, dtype=np.float32).reshape(8, 3)
    tower = finetune._Tower(lambda rows: rows, torch.nn.Identity(), states, Runtime())
    few = limited(tower.pooled, 4)
    for _ in range(2):
        np.testing.assert_array_equal(tower.in_parts(few, np.arange(8)), states)
    assert few.sizes == [4] * 4
    assert capsys.readouterr().err.count("out of memory") == 1


def test_a_precision_that_is_unknown_is_refused():
    with pytest.raises(FifaError, match="no such precision"):
        encoders.make_encoder("minilm", dtype="int8")
