"""A flipped byte or a truncated half in what a training wrote: told by name, or made again."""

import shutil

import pytest
from trainings import LORA, quick, weights_of

from fifa.config.train import FACTS_FILE, STATS, TRAIN_FILE
from fifa.errors import FifaError
from fifa.evaluation.models import find_models, read_training
from fifa.training.fit import Fit, keep_fit, kept_fit
from fifa.training.job import run_training


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A LoRA and whole weights, of the same pairs."""
    folder = tmp_path_factory.mktemp("trained")
    for method in ("lora", "full"):
        knobs = {"checkpoint_every": 2, "save_every": 2, "log_every": 1, "method": method}
        run_training(quick(world, **knobs), folder / method)
    return folder


def damages(path):
    """The file's content, a byte of it flipped, and half of it."""
    whole = path.read_bytes()
    middle = len(whole) * 2 // 3
    yield whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    yield whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("lora", LORA),
        ("lora", f"checkpoints/step-000002/{LORA}"),
        ("lora", FACTS_FILE),
        ("lora", TRAIN_FILE),
        ("lora", STATS),
        ("lora", "digests.json"),
        ("full", "unet/config.json"),
        ("full", "unet/diffusion_pytorch_model.safetensors"),
        ("full", "checkpoints/step-000002/unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_evaluation_tells_what_is_damaged(world, trained, tmp_path, method, name):
    out = shutil.copytree(trained / method, tmp_path / "out")
    place = out / "checkpoints/step-000002" if "checkpoints" in name else out

    def looked_at():
        _, tuned = find_models(str(world / "sd15"), {"tuned": str(place)})
        return read_training(tuned).facts["steps"]

    assert looked_at() == 3
    for damaged in damages(out / name):
        (out / name).write_bytes(damaged)
        with pytest.raises(FifaError, match=name):
            looked_at()


def test_statistics_and_states_that_are_damaged_are_not_gone_on_with(world, trained, tmp_path):
    out = shutil.copytree(trained / "lora", tmp_path / "out")
    (out / FACTS_FILE).unlink()  # as if it had been killed at its very end
    train = quick(world, checkpoint_every=2, save_every=2, log_every=1)
    whole = (out / STATS).read_bytes()
    for damaged in damages(out / STATS):
        (out / STATS).write_bytes(damaged)
        with pytest.raises(FifaError, match=rf"statistics are not[\s\S]*{STATS}"):
            run_training(train, out)
    (out / STATS).write_bytes(whole)
    state = next((out / "state").iterdir())
    for name in ("state.json", "state.pt"):
        kept = (state / name).read_bytes()
        for damaged in damages(state / name):
            (state / name).write_bytes(damaged)
            with pytest.raises(FifaError, match=state.name):
                run_training(train, out)
        (state / name).write_bytes(kept)
    run_training(train, out)
    assert (out / STATS).read_bytes() == whole
    same = weights_of(out), weights_of(trained / "lora")
    assert all(bool((value == same[1][name]).all()) for name, value in same[0].items())


def test_what_fits_a_device_is_found_again_if_the_file_is_damaged(tmp_path):
    path = tmp_path / "device.json"
    assert kept_fit(path, "card", 4) is None
    keep_fit(path, Fit(8, False), "card", 4)
    assert kept_fit(path, "card", 4) == Fit(8, False)
    assert kept_fit(path, "card", 5) is None
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert kept_fit(path, "card", 4) in (None, Fit(8, False))
        path.write_bytes(whole[:at])
        assert kept_fit(path, "card", 4) is None


def test_a_damaged_cache_is_made_again_to_the_byte(world, tmp_path, capfd):
    train = quick(world, draws=2)
    out = run_training(train, tmp_path / "out")
    cache = {path: path.read_bytes() for path in (out / "cache").iterdir() if path.is_file()}
    assert {path.name.partition("-")[0] for path in cache} == {
        *("images", "prompts", "moments", "reference")
    }
    for number in (0, 1):
        for path in cache:
            path.write_bytes(list(damages(path))[number])
        again = shutil.copytree(out, tmp_path / f"again-{number}")
        shutil.rmtree(again / "state")
        (again / FACTS_FILE).unlink()
        run_training(train, again)
        assert capfd.readouterr().err.count("made again") == len(cache)
        assert {path.name: path.read_bytes() for path in (again / "cache").iterdir()} == {
            path.name: data for path, data in cache.items()
        }
        assert (again / LORA).read_bytes() == (out / LORA).read_bytes()
