"""The cache: every image and prompt once, what is read is what was encoded, memory stays flat."""

import pickle
import resource
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_diffusion import images_of, picture, write_model, write_pairs

from fifa.data.decode import open_image
from fifa.errors import FifaError
from fifa.shards.pool import LocalPool
from fifa.training import encoding
from fifa.training.backbones import load_backbone
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.sd import StableDiffusion
from fifa.training.backbones.vae import Vae
from fifa.training.cache import cache_bytes, encode
from fifa.training.encoding import images_at_once, prompts_at_once
from fifa.training.pairs import read_training_pairs
from fifa.training.resize import Resize, cut

SIZES = [((64, 64), (64, 64)), ((96, 64), (200, 128)), ((64, 96), (64, 96)), ((64, 64), (96, 64))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "sd15")


@pytest.fixture(scope="module")
def backbone(model):
    return load_backbone(model)


def counted(backbone, monkeypatch):
    """How many images and prompts go through the encoders."""
    seen = {"images": 0, "prompts": []}
    images, prompts = backbone.vae.moments, backbone.encode_prompts

    def encode_images(pixels):
        seen["images"] += len(pixels)
        return images(pixels)

    def encode_prompts(texts):
        seen["prompts"] += texts
        return prompts(texts)

    monkeypatch.setattr(backbone.vae, "moments", encode_images)
    monkeypatch.setattr(backbone, "encode_prompts", encode_prompts)
    return seen


def direct(backbone, data, frame, flip=False):
    pixels = cut(open_image(data), frame, flip)
    return backbone.vae.moments(torch.from_numpy(pixels)[None].float() / 127.5 - 1)[0]


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_is_what_was_encoded(tmp_path, backbone, buckets, dtype):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", SIZES * 2))
    encoded = encode(pairs, backbone, tmp_path / "c", resolution=64, buckets=buckets, dtype=dtype)
    kind = getattr(torch, dtype)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    resize = Resize(64, 8, buckets)
    for i in range(len(pairs)):
        images = images_of(pairs, i)
        winner, loser = (open_image(data).size[::-1] for data in images)
        frames = resize.frames(winner, loser)
        expected = torch.stack(
            [direct(backbone, d, f) for d, f in zip(images, frames, strict=True)]
        )
        moments = encoded.moments(i)
        assert moments.dtype == kind
        torch.testing.assert_close(moments.float(), expected, atol=tolerance, rtol=tolerance)
        assert encoded.frames(i).tolist() == [list(frame) for frame in frames]
        assert encoded.shape(i) == tuple(moments.shape[2:])
        assert len({tuple(frame[4:]) for frame in frames}) == 1
        prompt = backbone.encode_prompts([pairs.caption[i]])["prompt"][0]
        torch.testing.assert_close(
            encoded.prompts(i)["prompt"].float(), prompt, atol=tolerance, rtol=tolerance
        )
    empty = backbone.encode_prompts([""])["prompt"][0]
    torch.testing.assert_close(
        encoded.empty["prompt"].float(), empty, atol=tolerance, rtol=tolerance
    )
    shapes = {encoded.shape(i) for i in range(len(pairs))}
    assert len(shapes) == 1 if not buckets else len(shapes) > 1


def test_moments_are_kept_and_not_a_sample(tmp_path, backbone):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    encoded = encode(pairs, backbone, tmp_path / "c", resolution=64, dtype="float32")
    moments = encoded.moments(0)
    mean, std = moments.chunk(2, dim=1)
    assert (std > 0).all() and mean.shape == std.shape == (2, 4, 8, 8)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = [backbone.vae.latents(moments, noise * scale) for scale in (0, 1)]
    _, scale = backbone.vae.norm
    torch.testing.assert_close(samples[0], mean * scale)
    torch.testing.assert_close(samples[1] - samples[0], std * noise * scale)


def test_recurring_images_and_prompts_are_encoded_once(tmp_path, backbone, monkeypatch):
    draw = np.random.default_rng(0)
    few = [picture(draw, 64, 64) for _ in range(3)]
    path = write_pairs(
        tmp_path / "a.parquet",
        [((8, 8), (8, 8))] * 6,
        jpg_0=[few[0], few[0], few[1], few[1], few[2], few[0]],
        jpg_1=[few[1], few[2], few[2], few[0], few[0], few[1]],
        caption=["one", "two", "one", "two", "one", "three"],
    )
    pairs = read_training_pairs(path)
    seen = counted(backbone, monkeypatch)
    encoded = encode(pairs, backbone, tmp_path / "c", resolution=64)
    assert seen["images"] == 3
    assert sorted(seen["prompts"]) == ["", "one", "three", "two"]
    assert torch.equal(encoded.moments(0)[0], encoded.moments(1)[0]) == (
        images_of(pairs, 0)[0] == images_of(pairs, 1)[0]
    )
    again = encode(pairs, backbone, tmp_path / "c", resolution=64)
    assert seen["images"] == 3
    assert again.digest == encoded.digest and again.bytes == encoded.bytes


def test_one_network_at_a_time_and_none_where_nothing_is_missing(tmp_path, model, monkeypatch):
    backbone, held = load_backbone(model), []
    load = ModelFolder.model

    def recorded(self, part, *more):
        held.append((part, bool(backbone._text), backbone.vae._network is not None))
        return load(self, part, *more)

    monkeypatch.setattr(ModelFolder, "model", recorded)
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    cache_bytes(pairs, backbone, 64, "float16")
    assert held == []
    encode(pairs, backbone, tmp_path / "c", resolution=64)
    assert held == [("text_encoder", False, False), ("vae", False, False)]
    assert not backbone._text and backbone.vae._network is None
    again = load_backbone(model)
    encode(pairs, again, tmp_path / "c", resolution=64)
    again.drop_encoders()
    assert len(held) == 2


def test_where_memory_runs_out_fewer_go_together_and_the_bytes_are_the_same(
    tmp_path, model, monkeypatch, capsys
):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", SIZES * 3))
    encode(pairs, load_backbone(model), tmp_path / "whole", resolution=64)
    backbone = load_backbone(model)
    seen = counted(backbone, monkeypatch)
    images, prompts, room, sizes = backbone.vae.moments, backbone.encode_prompts, 3, []

    def limited(function):
        def call(inputs):
            if len(inputs) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            sizes.append(len(inputs))
            return function(inputs)

        return call

    monkeypatch.setattr(backbone.vae, "moments", limited(images))
    monkeypatch.setattr(backbone, "encode_prompts", limited(prompts))
    encode(pairs, backbone, tmp_path / "short", resolution=64)
    assert max(sizes) <= 3 and seen["images"] == 24 and len(seen["prompts"]) == 13
    told = capsys.readouterr().err
    assert "2 images at a time from here on" in told
    assert "3 prompts at a time from here on" in told
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "short")
    ]
    assert files[0] == files[1]
    room = 0
    with pytest.raises(FifaError, match="out of memory with a single prompt"):
        encode(pairs, backbone, tmp_path / "none", resolution=64)
    monkeypatch.setattr(backbone, "encode_prompts", prompts)
    with pytest.raises(FifaError, match="out of memory with a single image"):
        encode(pairs, backbone, tmp_path / "none", resolution=64)


def test_on_cuda_batches_are_of_about_as_many_pixels_and_tokens(model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "free_bytes", lambda device: 80 * 10**9)
    there = load_backbone(model, device="cuda")
    assert [images_at_once(there, side) for side in (256, 512, 1024, 4096)] == [64, 16, 4, 1]
    # 3.2 GB an image of 1,024 pixels in float32
    monkeypatch.setattr(encoding, "free_bytes", lambda device: 12 * 10**9)
    assert [images_at_once(there, side) for side in (512, 1024, 2048)] == [11, 2, 1]
    assert prompts_at_once(there) == 8192 // 16
    flux = load_backbone(write_model(tmp_path, "flux-dev"), device="cuda")
    assert prompts_at_once(flux) == 8192 // 512
    here = load_backbone(model)
    assert [images_at_once(here, side) for side in (64, 1024)] == [8, 8]
    assert prompts_at_once(here) == 16


def test_text_that_is_not_finite_is_told(tmp_path, backbone, monkeypatch):
    encode_prompts = backbone.encode_prompts
    monkeypatch.setattr(
        backbone,
        "encode_prompts",
        lambda texts: {name: float("nan") * x for name, x in encode_prompts(texts).items()},
    )
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    with pytest.raises(FifaError, match="the text encoders give infinite or NaN"):
        encode(pairs, backbone, tmp_path / "c", resolution=64)


def test_moments_that_are_not_finite_are_the_vaes(tmp_path, backbone, monkeypatch):
    images = backbone.vae.moments
    monkeypatch.setattr(backbone.vae, "moments", lambda pixels: float("inf") * images(pixels))
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    with pytest.raises(FifaError, match="the VAE gives infinite or NaN latents in float32"):
        encode(pairs, backbone, tmp_path / "c", resolution=64, dtype="bfloat16")


def test_flips_are_encoded_not_mirrored_latents(tmp_path, backbone):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", SIZES))
    encoded = encode(pairs, backbone, tmp_path / "c", resolution=64, flips=True, dtype="float32")
    frames = [encoded.frames(1)[side].tolist() for side in (0, 1)]
    resize = Resize(64, 8).frames(*(tuple(frame[:2]) for frame in frames))
    for flip in (False, True):
        expected = [
            direct(backbone, data, frame, flip)
            for data, frame in zip(images_of(pairs, 1), resize, strict=True)
        ]
        torch.testing.assert_close(encoded.moments(1, flip), torch.stack(expected))
    plain = encode(pairs, backbone, tmp_path / "c", resolution=64, dtype="float32")
    with pytest.raises(FifaError, match="encode with flips"):
        plain.moments(0, flip=True)


def test_other_encoders_sizes_and_precisions_never_mix(tmp_path, backbone):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    other = load_backbone(write_model(tmp_path / "other", seed=1))
    made = [
        encode(pairs, which, tmp_path / "c", resolution=resolution, dtype=dtype)
        for which, resolution, dtype in [
            (backbone, 64, "float16"),
            (backbone, 32, "float16"),
            (backbone, 64, "float32"),
            (other, 64, "float16"),
        ]
    ]
    assert len({encoded.digest for encoded in made}) == 4
    assert not torch.equal(made[0].moments(0), made[3].moments(0))


def test_processes_that_share_the_work_make_the_same_files(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 3)
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", SIZES * 3))
    whole = encode(pairs, backbone, tmp_path / "whole", resolution=64)

    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        encode(pairs, backbone, tmp_path / "both", resolution=64, share=(0, 2), wait=stop)
    half = len([*(tmp_path / "both").glob("*.safetensors")])
    both = encode(pairs, backbone, tmp_path / "both", resolution=64, share=(1, 2))
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "both").iterdir()} == files
    assert 0 < half < len(files) - 1 and both.digest == whole.digest


def test_workers_elsewhere_make_the_same_files(tmp_path, model, monkeypatch, capfd, one_thread):
    monkeypatch.setattr(encoding, "SHARD", 3)
    monkeypatch.setattr(encoding, "TOGETHER", 2)
    captions = [f"{'the cat ' * 100}{i % 5}" for i in range(12)]
    path = write_pairs(tmp_path / "a.parquet", SIZES * 3, caption=captions)
    pairs, asked = read_training_pairs(path), {"resolution": 64, "buckets": True, "flips": True}
    here = encode(pairs, load_backbone(model), tmp_path / "here", **asked)
    backbone, pool = load_backbone(model), LocalPool(2)

    def never(*more):
        raise AssertionError("the driver loads a network")

    monkeypatch.setattr(ModelFolder, "model", never)
    try:
        asked["executor"] = pool
        capfd.readouterr()
        second = encode(pairs, backbone, tmp_path / "there", share=(0, 2), **asked)
        assert "5 captions are longer than the text encoder reads" in capfd.readouterr().err
        files = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
        assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == files
        assert (second.digest, second.bytes) == (here.digest, here.bytes)
        with pytest.raises(FifaError, match="cannot be read"):  # of what another process makes
            encode(pairs, backbone, tmp_path / "none", share=(1, 2), **asked)

        cells = pq.read_table(path)["jpg_0"].to_pylist()
        cells[10] = cells[10][: len(cells[10]) // 2]  # a good header
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "jpg_0", pa.array(cells)), path)
        broken = read_training_pairs(path)
        with pytest.raises(FifaError, match=f"pair {broken.pair_id[10]}, "):
            encode(broken, backbone, tmp_path / "broken", **asked)

        other = partial(load_backbone, write_model(tmp_path / "other", seed=1))
        monkeypatch.setattr(encoding, "again", lambda backbone: other)
        with pytest.raises(FifaError, match="a worker has another model"):
            encode(pairs, backbone, tmp_path / "mixed", **asked)
        assert not list((tmp_path / "mixed").glob("*.safetensors"))
    finally:
        pool.close()


def test_a_batch_is_read_back_once_the_next_is_on_the_device(tmp_path, model, monkeypatch):
    events, moments, kept = [], Vae.moments, encoding.Encoder._kept

    def begun(self, pixels):
        events.append("begun")
        return moments(self, pixels)

    def read(self, what, value):
        if what == "moments":
            events.append("read")
        return kept(self, what, value)

    monkeypatch.setattr(Vae, "moments", begun)
    monkeypatch.setattr(encoding.Encoder, "_kept", read)
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    encode(pairs, load_backbone(model), tmp_path / "cache", resolution=64, batch=3)
    assert events == ["begun", "begun", "read", "begun", "read", "read"]  # 3, 3 and 2 images


class Elsewhere(LocalPool):
    """What an executor's workers get is what travels to them."""

    is_here = False

    def map(self, make, shards, ledger):
        make, shards = pickle.loads(pickle.dumps((make, list(shards))))
        return self._here(make, shards, ledger)


def test_memory_that_runs_out_in_a_worker_halves_its_batches(tmp_path, model, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 3)
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", SIZES))
    encode(pairs, load_backbone(model), tmp_path / "here", resolution=64)
    sizes, room, failed = [], 1, []

    def limited(function):
        def call(self, inputs):
            # as in a training: see `fifa.training.encoding.arithmetic`
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            if len(inputs) > room:
                failed.append(len(inputs))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            sizes.append(len(inputs))
            return function(self, inputs)

        return call

    for owner, name in ((Vae, "moments"), (StableDiffusion, "encode_prompts")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))
    asked = {"resolution": 64, "executor": Elsewhere()}
    encode(pairs, load_backbone(model), tmp_path / "there", **asked)
    assert sizes == [1] * (5 + 8)
    assert failed == [3, 3]  # of prompts and of images, in the first shard and in no other
    here, there = ({path.name for path in (tmp_path / n).iterdir()} for n in ("here", "there"))
    assert here == there
    room = 0
    with pytest.raises(FifaError, match="out of memory with a single prompt"):
        encode(pairs, load_backbone(model), tmp_path / "none", **asked)


def test_a_broken_image_is_named_before_anything_is_encoded(tmp_path, backbone, monkeypatch):
    path = write_pairs(tmp_path / "a.parquet", pair_id=list("abcd"))
    table = pq.read_table(path)
    cells = table["jpg_0"].to_pylist()
    cells[2] = b"<html>not found</html>"
    pq.write_table(table.set_column(0, "jpg_0", pa.array(cells)), path)
    seen = counted(backbone, monkeypatch)
    with pytest.raises(FifaError, match=r"no JPEG, PNG, WEBP, AVIF or HEIC[\s\S]*pair c, loser"):
        encode(read_training_pairs(path), backbone, tmp_path / "c", resolution=64)
    assert seen == {"images": 0, "prompts": []}
    cells[2] = table["jpg_0"][2].as_py()[:200]  # a good header, and then nothing
    pq.write_table(table.set_column(0, "jpg_0", pa.array(cells)), path)
    with pytest.raises(FifaError, match=r"more pixels than[\s\S]*pair c, loser"):
        encode(read_training_pairs(path), backbone, tmp_path / "c", resolution=64)


def test_numbers_beyond_float16_are_refused(tmp_path, backbone, monkeypatch):
    images = backbone.vae.moments
    monkeypatch.setattr(backbone.vae, "moments", lambda pixels: 1e6 * images(pixels))
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    with pytest.raises(FifaError, match="bfloat16 or float32"):
        encode(pairs, backbone, tmp_path / "c", resolution=64)
    assert encode(pairs, backbone, tmp_path / "c", resolution=64, dtype="bfloat16").bytes > 0


def test_a_damaged_shard_is_named_and_made_again(tmp_path, backbone, capfd):
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet"))
    encode(pairs, backbone, tmp_path / "c", resolution=64)
    shard = next((tmp_path / "c").glob("moments-*"))
    whole = shard.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"x", b""):
        shard.write_bytes(damaged)
        encode(pairs, backbone, tmp_path / "c", resolution=64)
        assert f"made again: {shard}" in capfd.readouterr().err
        assert shard.read_bytes() == whole


def test_the_estimate_bounds_the_bytes(tmp_path, backbone):
    sizes = [((80, 80), (80, 80))] * 40
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", sizes))
    encoded = encode(pairs, backbone, tmp_path / "c", resolution=64)
    estimate = sum(cache_bytes(pairs, backbone, 64, "float16"))
    assert estimate <= encoded.bytes < 1.1 * estimate  # headers come on top


def test_memory_is_flat_in_the_number_of_pairs(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 16)

    def growth(n):
        noise = np.random.default_rng(n).integers(0, 256, (n, 2, 300_000), np.uint8)
        draw = np.random.default_rng(n)
        # bytes behind the end of an image are none of its pixels, but have to be read
        cells = [[picture(draw, 64, 64) + one.tobytes() for one in both] for both in noise]
        path = write_pairs(
            tmp_path / f"{n}.parquet",
            [((8, 8), (8, 8))] * n,
            jpg_0=[c[0] for c in cells],
            jpg_1=[c[1] for c in cells],
            pair_id=[str(i) for i in range(n)],
        )
        del noise, cells
        pairs = read_training_pairs(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encode(pairs, backbone, tmp_path / f"c{n}", resolution=64)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    growth(80)  # 48 MB of images, held once by the writer of the file
    assert growth(80) < 24


def test_captions_that_are_cut_are_counted_and_those_that_then_coincide(tmp_path, backbone, capfd):
    long = "the cat " * 100
    captions = [f"{long} one", f"{long} two", f"a dog {long}", "short"]
    path = write_pairs(tmp_path / "a.parquet", caption=captions)
    encode(read_training_pairs(path), backbone, tmp_path / "c", resolution=64)
    told = capfd.readouterr().err
    assert "3 of 4 captions are longer than the text encoder reads" in told
    assert "2 of these are then the same as another" in told


def test_prompts_of_models_with_masks_are_kept_without_padding(tmp_path, models):
    """And read back as they were encoded, from the files or, without these, made again."""
    backbone = load_backbone(models["zimage"])
    captions = ["the cat", "a", "a longer one, on a moon!", "the cat"]
    pairs = read_training_pairs(write_pairs(tmp_path / "a.parquet", caption=captions))
    shapes = {"resolution": 64, "dtype": "float32"}
    encoded = encode(pairs, backbone, tmp_path / "c", **shapes)
    numbers = sum(backbone.reader.counts(["", *captions[:3]])) * 32
    _, prompts = cache_bytes(pairs, backbone, 64, "float32")
    assert prompts == 4 * numbers
    files = sum(path.stat().st_size for path in (tmp_path / "c").glob("prompts-*.safetensors"))
    assert prompts < files < prompts + 1000
    again = encode(pairs, backbone, tmp_path / "d", prompts=False, **shapes)
    assert not list((tmp_path / "d").glob("prompts-*"))
    assert len({encoded.digest, again.digest}) == 2
    backbone.drop_encoders(text=False)
    for caption in ("", *pairs.caption):
        expected = backbone.encode_prompts([caption])
        for found in (encoded.text(caption), again.text(caption)):
            assert found.keys() == expected.keys()
            assert found["mask"].all()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name][0], atol=1e-6, rtol=1e-6)
