"""The names of reward models, raters and encoders: what a spec may say, and what makes it.

A spec is a name, with a model where it takes one: ``pickscore``, ``hpsv2.1:FOLDER``,
``openai:MODEL@URL``, ``proxy@clip:MODEL``. The four registries below are the only place that
knows the names; help texts and error messages are made from them. Adding a reward model, a rater
or an encoder is one line here and one file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from fifa.errors import FifaError


@dataclass(frozen=True)
class Entry:
    """One line of a registry.

    Parameters
    ----------
    name
        What a spec begins with.
    maker
        ``module:function or class`` below `fifa.scoring`, imported when it is first needed.
        Empty for what is read from the source's own columns, or trained here.
    hub
        The model that is taken where a spec names none.
    scale
        Of a reward model: what a reward is, in words and formula.
    family
        Of a reward model: the same for close relatives, and part of the name of columns that hold
        its scores. Default: its name.
    dtype
        What a model computes in unless told otherwise; empty for what is fastest on the device.
    takes
        What follows the name, optional parts in brackets: ``[:MODEL]``, ``:MODEL[@URL]``.
    """

    name: str
    maker: str = ""
    hub: str = ""
    scale: str = ""
    family: str = ""
    dtype: str = ""
    takes: str = "[:MODEL]"

    @property
    def form(self) -> str:
        """How a spec is written, for people."""
        return self.name + self.takes

    @property
    def pattern(self) -> str:
        """The same as a regular expression with the groups ``model`` and ``at``."""
        model = ".*?" if "@URL" in self.takes else ".+"
        pattern = self.takes.replace("[", "(?:").replace("]", ")?")
        pattern = re.sub(
            "@[A-Z]+", "@(?P<at>http.*)" if "@URL" in self.takes else "@(?P<at>.+)", pattern
        )
        return re.escape(self.name) + re.sub(":[A-Z][A-Z_0-9,]+", f":(?P<model>{model})", pattern)


@dataclass(frozen=True)
class Spec:
    """A spec, taken apart.

    Parameters
    ----------
    text
        As it was given.
    entry
        The line of the registry that it names.
    model
        A folder, file, hub id or name of a model, or the names of columns; empty without one.
    at
        The URL of an endpoint, the encoder of a proxy; empty without one.
    """

    text: str
    entry: Entry = field(repr=False)
    model: str = ""
    at: str = ""

    @property
    def name(self) -> str:
        """What it begins with."""
        return self.entry.name

    @property
    def is_column(self) -> bool:
        """True for what the source brings itself."""
        return self.name == "column"

    @property
    def is_judge(self) -> bool:
        """True for a vision-language model behind an endpoint."""
        return self.entry.maker.startswith("judges.")

    @property
    def alone(self) -> bool:
        """True for a judge that sees one image at a time: ``vlm-image:MODEL``."""
        return self.text.startswith(f"{self.name}-image:")

    @property
    def by_generator(self) -> bool:
        """True for what needs the generators' names and no images."""
        return self.name in ("arena", "arena:names")

    @property
    def trained_here(self) -> bool:
        """True for a proxy that is cross-fitted on the pairs it scores."""
        return self.name == "proxy" and not self.model

    def make(self, *arguments: Any, **options: Any) -> Any:
        """Call what makes it, with this spec and then ``arguments`` and ``options``."""
        module, _, maker = self.entry.maker.partition(":")
        return getattr(import_module(f"fifa.scoring.{module}"), maker)(self, *arguments, **options)


class Registry:
    """All entries of one role.

    Parameters
    ----------
    role
        ``reward model``, ``rater``, ``encoder`` or ``image encoder``: for error messages.
    entries
        In the order in which people see them. Several may share a name.
    """

    def __init__(self, role: str, *entries: Entry) -> None:
        self.role, self.entries = role, entries

    @property
    def forms(self) -> str:
        """Every way to write a spec, for help texts and errors."""
        return ", ".join(entry.form for entry in self.entries)

    @property
    def made(self) -> str:
        """The forms that need no pairs: neither columns, nor labels to learn from."""
        return ", ".join(entry.form for entry in self.entries if entry.maker)

    def parse(self, text: str) -> Spec:
        """The spec in ``text``; `FifaError` lists the forms where it names nothing."""
        for entry in self.entries:
            if found := re.fullmatch(entry.pattern, text, re.DOTALL):
                groups = {name: part or "" for name, part in found.groupdict().items()}
                return Spec(text, entry, **groups)
        raise self.error(text)

    def error(self, text: str) -> FifaError:
        """What `parse` raises."""
        return FifaError(f"no such {self.role}: {text}", do=f"one of: {self.forms}")


_JUDGE, _ASKED = "judges.judge:make_judge", "[-image]:MODEL[@URL]"
_CLIP, _HPS = "rewards.clip:ClipReward", "rewards.hps:HPSReward"
_AESTHETIC = "rewards.clip:AestheticReward"
_HPSV3_PLUS = "rewards.hpsv3_plus:HPSv3Plus"
_COSINE = "cos(prompt, image)"
_TORCHMETRICS = f"max(100 * {_COSINE}, 0), as in torchmetrics"
_THROUGH = f"exp(logit_scale) * {_COSINE}, the image as its prompt sees it under a condition"
_HESSEL = "2.5 * max(cos('A photo depicts ' + prompt, image), 0), as in Hessel et al. 2021"
_MU = "mu, the mean of the reward's distribution; sigma is the exponential of the second output"
_STANDARD = "(r - 0.16717) / 1.03334: mean 0 and spread 1 on ImageReward's own data"
_POINTS = "points of LAION's aesthetic predictor v2, about 1 to 10; blind to the prompt"
_LOGODDS = "log-odds that people prefer the image, calibrated on prompts held out of its training"

REWARDS = Registry(
    "reward model",
    Entry("column", takes=":NAME_0,NAME_1"),
    Entry("arena", takes=""),
    Entry("arena:names", takes=""),
    Entry("pickscore", _CLIP, "yuvalkirstain/PickScore_v1", f"exp(logit_scale) * {_COSINE}"),
    Entry("hpsv2", _HPS, "xswu/HPSv2", _COSINE, family="hps"),
    Entry("hpsv2.1", _HPS, "xswu/HPSv2", _COSINE, family="hps"),
    Entry("hpsv3", "rewards.hpsv3:HPSv3", "MizzenAI/HPSv3", _MU, dtype="bfloat16"),
    Entry("hpsv3++", _HPSV3_PLUS, "Junjun2333/HPSv3-PlusPlus", _MU, "hpsv3", "bfloat16"),
    Entry("imagereward", "rewards.imagereward:ImageReward", "THUDM/ImageReward", _STANDARD),
    Entry("mps", "rewards.mps:MPS", "RE-N-Y/mpsv1", _THROUGH),
    Entry("clipscore", _CLIP, "openai/clip-vit-large-patch14", _TORCHMETRICS, family="clip"),
    Entry("clipscore-b32", _CLIP, "openai/clip-vit-base-patch32", _HESSEL, family="clip"),
    Entry("aesthetic", _AESTHETIC, "trl-lib/ddpo-aesthetic-predictor", _POINTS),
    # in the format of the model's family, or in one that is named
    Entry("vlm", _JUDGE, takes=_ASKED),
    # the same judges in this process, by vLLM's engine
    Entry("vllm", _JUDGE, takes="[-image]:MODEL", family="vlm"),
    Entry("unifiedreward", _JUDGE, takes=_ASKED, family="vlm"),
    Entry("rationalrewards", _JUDGE, takes=_ASKED, family="vlm"),
    Entry("rubric", "judges.questions:load_rubric_judge", takes=":FOLDER[@URL]"),
    Entry("proxy", takes=""),
    Entry("proxy", takes="@ENCODER"),
    # as its head was trained
    Entry("proxy", "rewards.proxy:load_proxy", scale=_LOGODDS, dtype="float32", takes=":FOLDER"),
)
RATERS = Registry(
    "rater",
    Entry("local", "raters.local:make_local"),
    Entry("openai", "raters.endpoint:make_endpoint", takes=":MODEL[@URL]"),
    Entry("vllm", "raters.endpoint:make_endpoint", takes=":MODEL"),
    Entry("column", takes=":NAME"),
)
ENCODERS = Registry(
    "encoder",
    # small, and the harm heads were trained on it
    Entry("minilm", "encoders:make_minilm", dtype="float32", takes=""),
    Entry("text", "encoders:make_transformer", takes=":MODEL"),
    Entry("clip", "encoders:make_transformer", takes=":MODEL"),
    Entry("column", takes=":NAME"),
)
IMAGE_ENCODERS = Registry(
    "image encoder",
    Entry("efficientnet-lite0", "rewards.image_encoders:make_efficientnet", takes="[:SIDE]"),
    Entry("clip", "rewards.image_encoders:ClipImages", takes=":MODEL"),
    Entry("image", "rewards.image_encoders:VisionModel", takes=":MODEL"),
)
