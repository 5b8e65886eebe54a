"""HPSv3++: HPSv3's question to Qwen3-VL, judged for how capable the image's generator seems to be.

The arithmetic is that of ``Qwen3VLRewardModelFiLMHybrid`` and ``HPSv3RewardInferencer`` in
PlantPotatoOnMoon/HPSv3-PlusPlus (arXiv 2606.14657) on transformers 4.57, here on today's
`Qwen3VLModel`. There, all images of a batch share one capability, so that a reward depends on its
neighbours; here each image has its own, which is the original with one image at a time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import Runtime, Tensor
from fifa.scoring.rewards import weights
from fifa.scoring.rewards.hpsv3 import AREA, COLLATOR, LINEAR, RUBRIC, USER, HPSv3, fill_qwen
from fifa.scoring.rewards.pixels import fit_twice
from fifa.scoring.specs import Spec

FITTED = 28  # the original fits an image to multiples of this first, which are Qwen2-VL's
STEP = 0.0  # of the generator's RL training, 0 to 1: the original's default, for ordinary images
PARTS = ("model.", "rm_head.", "cond_encoder.", "film_gen.", "cap_encoder.")


class HPSv3Plus(HPSv3):
    """A reward by a vision-language model: a `fifa.scoring.rewards.RewardModel`.

    Parameters and features are those of `HPSv3`; the features of the image half's inner layers
    stand behind those of its last one.
    """

    files = ("hpsv3++.pth", "hpsv3++.safetensors")
    base = "Qwen/Qwen3-VL-8B-Instruct"
    beside = "tokenizer.json"  # the weights come with a config.json that is not Qwen's
    chat = USER
    mean = std = (0.5, 0.5, 0.5)
    rubric = (
        f"put hpsv3/dataset/{COLLATOR} of PlantPotatoOnMoon/HPSv3-PlusPlus there (only its text is "
        f"read), or write {RUBRIC}"
    )

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        kind = self._config.get("model_type")
        if kind != "qwen3_vl":
            raise FifaError(
                f"the settings are those of a {kind} model, not of Qwen3-VL",
                where=str(self._base / "config.json"),
                do=f"put config.json of {self.base} there",
            )
        self.preprocess = partial(fit_twice, area=AREA, factor=FITTED, then=self._factor)
        self.preprocessing += f"; factor {FITTED} first; step {STEP}"

    def _places(
        self, states: Tensor, place: int, grid: tuple[int, int], deep: list[Tensor]
    ) -> dict[str, Any]:
        """Positions in time, height and width, and what is added to the image's tokens."""
        torch = require("torch")
        b, length = states.shape[:2]
        h, w = grid
        # before the image and behind it all three count on, from the larger side
        places = torch.arange(length, device=states.device).repeat(3, 1)
        places[:, place + h * w :] -= h * w - max(h, w)
        sides = (torch.arange(side, device=states.device) for side in grid)
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        inside = torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
        places[:, place : place + h * w] = place + inside
        image = torch.zeros(b, length, dtype=torch.bool, device=states.device)
        image[:, place : place + h * w] = True
        return {
            "position_ids": places[:, None].expand(3, b, length),
            "visual_pos_masks": image,
            "deepstack_visual_embeds": [features.flatten(0, 1) for features in deep],
        }

    def _judge(self, state: Tensor) -> Tensor:
        """(mu, log sigma) of the head on what FiLM makes of the state, float32 ``[b, 2]``::

        c = sigmoid(a2 (a1 s))
        gamma, beta = f2 relu(f1 (g2 gelu(g1 (c, STEP))))
        W3 relu(W2 relu(W1 (s (1 + gamma) + beta)))
        """
        torch, model = require("torch"), self._model
        state = state.float()
        # the softmax over the images of a batch, in front of a2, is 1 for one image
        capability = model["capability"](state.to(self._dtype)).sigmoid().float()
        condition = torch.cat([capability, torch.full_like(capability, STEP)], 1)
        gamma, beta = model["film"](model["condition"](condition)).chunk(2, -1)
        judged: Tensor = model["head"](state * (1 + gamma) + beta)
        return judged

    def _build(self, tensors: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Qwen3-VL without its language head, and the four heads, with HPSv3++'s weights.

        Raises `FifaError` for weights that are not HPSv3++'s.
        """
        where = self._weights
        tensors.pop("lm_head.weight", None)
        parts = weights.all_below(tensors, PARTS, "HPSv3++", where)
        qwen, head, condition, film, capability = parts
        # it weighs the images of a batch
        capability = {k: t for k, t in capability.items() if not k.startswith("pool_attn.")}
        heads = {
            "head": weights.linear_head(head, LINEAR, where, between="ReLU"),
            "condition": weights.linear_head(condition, (0, 2), where, between="GELU"),
            "film": weights.linear_head(film, (0, 2), where, between="ReLU"),
            # alone in the precision of the whole
            "capability": weights.linear_head(capability, ("proj", "out_proj"), where).to(
                self._dtype
            ),
        }
        return fill_qwen("Qwen3VL", qwen, self._config, where), heads

    def _collator(self) -> Path | None:
        return None
