"""The CLIP family: two towers and a cosine (PickScore, CLIPScore), or a head on the image tower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fifa.errors import FifaError
from fifa.models.hub import model_digest, model_folder
from fifa.models.networks import loading
from fifa.models.optional import require
from fifa.models.runtime import Runtime, Tensor, best_dtype
from fifa.models.transformer import ModelEncoder, load_model
from fifa.scoring.encoders import make_encoder
from fifa.scoring.rewards import PublishedReward
from fifa.scoring.rewards.pixels import MEAN, PREPROCESSING, STD, Preprocess, standardise
from fifa.scoring.rewards.weights import find_weights, linear_head, read_weights
from fifa.scoring.specs import Spec
from fifa.shards.files import files_digest, read_json


@dataclass(frozen=True)
class ClipFormula:
    """What a member of the family does with a cosine.

    Parameters
    ----------
    factor
        What the cosine is multiplied by; None for the model's own ``exp(logit_scale)``.
    floor
        The smallest reward, if there is one.
    prefix
        Put in front of every prompt.
    clean
        Mend mojibake and HTML entities first, as the tokenizers of OpenAI's CLIP and open_clip.
    preprocessing
        A key of `fifa.scoring.rewards.pixels.PREPROCESSING`.
    """

    factor: float | None
    floor: float | None = None
    prefix: str = ""
    clean: bool = False
    preprocessing: str = "convert-crop"


FORMULAS = {
    # PickScore's README and criterion: text_embs @ image_embs.T, both L2-normalised
    "pickscore": ClipFormula(None),
    # torchmetrics.functional.multimodal.clip_score
    "clipscore": ClipFormula(100.0, 0.0),
    # jmhessel/clipscore
    "clipscore-b32": ClipFormula(2.5, 0.0, "A photo depicts ", True, "crop-convert"),
    # hpsv2: the diagonal of image_features @ text_features.T; its tables print it times 100
    "hpsv2": ClipFormula(1.0, clean=True, preprocessing="pad"),
    "hpsv2.1": ClipFormula(1.0, clean=True, preprocessing="pad"),
}


AESTHETIC_FILES = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
)
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_LINEAR = (0, 2, 4, 6, 7)  # where the original has linear layers: dropout between


class ImageTower:
    """A CLIP's image half in a local folder, loaded when it is first used.

    Parameters
    ----------
    folder
        A transformers CLIP: config and safetensors.
    preprocessing
        A key of `fifa.scoring.rewards.pixels.PREPROCESSING`.
    runtime
        Where and how it computes.

    Attributes
    ----------
    side
        Of its input, in pixels.
    preprocess
        From an image to ``[3, side, side]``, uint8 or (where the original resizes floats) float32.

    Raises
    ------
    FifaError
        For a folder that is no CLIP, or whose images want other preprocessing than CLIP's.
    """

    def __init__(self, folder: Path, preprocessing: str, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        config = read_json(folder / "config.json", "the model's settings")
        if config.get("model_type") not in ("clip", "clip_vision_model"):
            raise FifaError(
                f"this is a {config.get('model_type')} model, not a CLIP", where=str(folder)
            )
        with loading("the model's settings", folder):
            self.side = int((config.get("vision_config") or config).get("image_size", 224))
        self.preprocess: Preprocess = partial(PREPROCESSING[preprocessing], size=self.side)
        # on CUDA half precision is the weights' too: autocast would read and write twice as much
        cuda = runtime.device.partition(":")[0] == "cuda"
        self._weights = runtime.dtype if cuda else "float32"
        self.description = f"{preprocessing} {self.side}, mean {MEAN}, std {STD}"
        _check_processor(folder, self.side)

    @cached_property
    def digest(self) -> str:
        """Names the content of the folder's files."""
        return model_digest(self.folder, nested=True)

    def embed(self, pixels: Tensor) -> Tensor:
        """L2-normalised embeddings, float32 ``[b, d]``, of preprocessed images."""
        torch = require("torch")
        autocast = self.runtime.autocast() if self._weights == "float32" else nullcontext()
        with torch.inference_mode(), autocast:
            out = self._model(pixel_values=standardise(self.runtime.pixels(pixels)))
            embeddings: Tensor = out.image_embeds.float()
            # x / |x|
            unit: Tensor = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return unit

    @cached_property
    def _model(self) -> Any:
        transformers = require("transformers")
        tower = transformers.CLIPVisionModelWithProjection
        model = load_model(tower, self.folder, self._weights)
        return self.runtime.place(model)


class ClipReward(PublishedReward):
    """A reward that is a cosine of two towers: a `fifa.scoring.rewards.RewardModel`.

    The text tower is the encoder ``clip:MODEL``, with the precision that the encoder has by default
    (float32 on processors, whatever ``dtype`` says), so that both give the same vectors; only where
    float32 is asked for it is float32 on every device.

    Parameters
    ----------
    spec
        A key of `FORMULAS`, and a folder or hub id of a transformers CLIP.
    runtime
        Where and how the image tower computes.

    Attributes
    ----------
    encoder
        The encoder whose vectors `prompt_features` are, the one that the diversity step makes of
        ``clip:MODEL``: `fifa.scoring.encoders.keep_embeddings` takes them. None where the scorer
        changes a prompt before it reads it.
    """

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self.formula = FORMULAS[spec.name]
        dtype = "float32" if runtime.dtype == "float32" != best_dtype(runtime.device) else None
        self._text: ModelEncoder = make_encoder(
            f"clip:{self.model}", device=runtime.device, dtype=dtype
        )
        changed = self.formula.clean or self.formula.prefix
        self.encoder = None if changed else self._text
        self._images = ImageTower(self._text.folder, self.formula.preprocessing, runtime)
        self.preprocessing = self._images.description

    @cached_property
    def identity(self) -> dict[str, Any]:
        """That of every published model, and the text tower's precision if it is not float32."""
        text = self._text.precision
        return {**super().identity, **({} if text == "float32" else {"text": text})}

    @property
    def weights_digest(self) -> str:
        """Of the folder: weights, config and tokenizer."""
        return self._images.digest

    @property
    def preprocess(self) -> Preprocess:
        """From an image of any mode to pixels ``[3, side, side]``."""
        return self._images.preprocess

    @property
    def side(self) -> int:
        """Of the input, in pixels."""
        return self._images.side

    def image_features(self, pixels: Tensor) -> Tensor:
        """L2-normalised embeddings, float32 ``[b, d]``."""
        return self._images.embed(pixels)

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings, float32 ``[n, d]``."""
        torch = require("torch")
        texts = [clean(p) for p in prompts] if self.formula.clean else prompts
        vectors = self._text.embed([self.formula.prefix + text for text in texts])
        features: Tensor = torch.from_numpy(vectors).to(self.runtime.device)
        return features

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: the formula, of the cosines of prompts i and images i."""
        # cos = t . v of unit vectors
        cosine = (prompts * images).sum(-1)
        reward = cosine * (self._own_factor if self.formula.factor is None else self.formula.factor)
        return reward if self.formula.floor is None else reward.clamp(min=self.formula.floor)

    @cached_property
    def _own_factor(self) -> float:
        """exp(logit_scale), from the weights."""
        safetensors = require("safetensors")
        for path in sorted(self._text.folder.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as tensors:
                if "logit_scale" in tensors.keys():  # noqa: SIM118 - it is no dict
                    return float(tensors.get_tensor("logit_scale").float().exp())
        raise FifaError("the weights lack logit_scale", where=str(self._text.folder))


class AestheticReward(PublishedReward):
    """LAION's aesthetic predictor v2: a linear stack on CLIP ViT-L/14, blind to the prompt.

    A `fifa.scoring.rewards.RewardModel`.

    Parameters
    ----------
    spec
        The head's weights: a file, a folder with them, or a hub id. CLIP ViT-L/14 lies in the
        folder ``clip`` beside them or comes from the hub.
    runtime
        Where and how it computes; the head always in float32.
    """

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self._weights = find_weights(self.model, AESTHETIC_FILES)
        beside = self._weights.parent / "clip"
        folder = beside if beside.is_dir() else model_folder(AESTHETIC_CLIP)
        # simple_inference.py of christophschuhmann/improved-aesthetic-predictor uses OpenAI's
        # own preprocessing
        self._images = ImageTower(folder, "crop-convert", runtime)
        self.preprocessing = self._images.description

    @property
    def weights_digest(self) -> list[str]:
        """Of the head and of the CLIP."""
        return [files_digest({"head": self._weights}), self._images.digest]

    @property
    def preprocess(self) -> Preprocess:
        """From an image of any mode to pixels, uint8 ``[3, side, side]``."""
        return self._images.preprocess

    @property
    def side(self) -> int:
        """Of the input, in pixels."""
        return self._images.side

    def image_features(self, pixels: Tensor) -> Tensor:
        """The points, float32 ``[b, 1]``."""
        torch = require("torch")
        embeddings = self._images.embed(pixels)
        with torch.inference_mode():
            points: Tensor = self._head(embeddings)
        return points

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Zeros, ``[n, 1]``: nothing is read in them."""
        torch = require("torch")
        nothing: Tensor = torch.zeros(len(prompts), 1, device=self.runtime.device)
        return nothing

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: the points."""
        return images[:, 0]

    @cached_property
    def _head(self) -> Any:
        tensors = {k.removeprefix("layers."): t for k, t in read_weights(self._weights).items()}
        head = linear_head(tensors, AESTHETIC_LINEAR, self._weights)
        return head.eval().requires_grad_(False).to(self.runtime.device)


def clean(prompt: str) -> str:
    """The prompt as OpenAI's CLIP and open_clip read it: mended, unescaped, single spaces."""
    import html

    mended = require("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(mended)).split())


def _check_processor(folder: Path, size: int) -> None:
    """Refuse a model whose preprocessor_config.json asks for anything but CLIP's own."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path, "the model's settings", missing={})
    crop = settings.get("crop_size", size)
    known: dict[str, tuple[Any, Any]] = {
        "image_mean": (settings.get("image_mean", MEAN), MEAN),
        "image_std": (settings.get("image_std", STD), STD),
        "resample": (settings.get("resample", 3), 3),
        "crop_size": (crop.get("height", size) if isinstance(crop, dict) else crop, size),
    }
    for name, (own, ours) in known.items():
        if not np.allclose(own, ours, atol=1e-6):
            raise FifaError(
                f"the model needs {name} {own}, scorers of the CLIP family use {ours}",
                where=str(path),
                do="choose a CLIP with OpenAI's preprocessing",
            )
