"""A vision-language model behind an endpoint as a reward model: ``vlm:MODEL@URL``.

Both images of a pair go into one message, and every pair is asked about in both orders; or, as
``vlm-image:MODEL@URL`` and wherever there are images but no pairs, each image is graded alone.
`fifa.scoring.judges.formats` has what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from fifa.config import Compute
from fifa.console import echo_once
from fifa.scoring.endpoint import VLLM, Endpoint, endpoint_of
from fifa.scoring.judges.formats import Format, Judgement, format_of, load_format, tokens_of_reply
from fifa.scoring.judges.pictures import QUALITY
from fifa.scoring.replies import text_of, tokens_of
from fifa.scoring.specs import Spec


@dataclass(frozen=True)
class Question:
    """A prompt, and how to get the URLs of the images that were made for it.

    Parameters
    ----------
    prompt
        As it was given to the image models.
    urls
        Gives the images' URLs, in the order in which they are shown; it may wait.
    """

    prompt: str
    urls: Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class VLMJudge(Endpoint):
    """Judges images with a vision-language model behind an OpenAI-compatible endpoint.

    Parameters
    ----------
    family
        The name of a format in `fifa.scoring.judges.formats`.
    shown
        Images in a message: 2, or 1.
    side, images
        How images are sent: see `fifa.config.Compute`.
    """

    family: str = "plain"
    shown: int = 2
    side: int = Compute.judge_side
    images: str = Compute.judge_images

    answer_type: ClassVar[type[BaseModel]] = Judgement
    words = ("asking", "questions about images", "answered")
    shows_images = True

    @property
    def name(self) -> str:
        """The model's name, for people and file names."""
        here = self.is_offline
        kind, model = (VLLM, Path(self.model).name) if here else ("vlm", self.model)
        return f"{kind}{'' if self.shown == 2 else '-image'}-{model}"

    @property
    def scale(self) -> str:
        """What a reward is."""
        return self.format.scale

    @property
    def format(self) -> Format:
        """What is asked."""
        return load_format(self.family, self.shown)

    @property
    def identity(self) -> dict[str, Any]:
        """What a reward depends on."""
        return self.asks

    @property
    def asks(self) -> dict[str, Any]:
        """What an answer depends on: model, endpoint, temperature, format, how images are sent."""
        sent = [self.side, self.images, *([QUALITY] if self.images == "jpeg" else [])]
        return {
            **self.source,
            "temperature": self.temperature,
            "format": self.format.identity,
            "images": sent,
        }

    def request(self, question: Question) -> dict[str, Any]:
        """The body of a chat completion; waits for the images."""
        content = self.format.content(question.prompt, question.urls())
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.format.request(),
        }

    def read(self, text: str) -> Judgement | str:
        """The judgement in an answer's text, without log-probabilities."""
        return self.format.read(text, [])

    def read_reply(self, reply: Any) -> BaseModel | str:
        """The judgement in a completion, from its log-probabilities where it has some."""
        found = self.format.read(text_of(reply, self.secrets()), tokens_of_reply(reply))
        if isinstance(found, Judgement):
            found.tokens = sum(tokens_of(reply))
        return found


def make_judge(
    spec: Spec,
    folder: Path | None = None,
    compute: Compute | None = None,
    *,
    shown: int | None = None,
) -> VLMJudge:
    """The judge that a spec names; answers are kept in ``folder``.

    ``vlm:`` takes the format that the model's own name calls for, and says so; ``shown`` images
    are in a message, None: as many as the spec says.

    Raises `FifaError` for a spec without a model, or with a broken URL.
    """
    compute = compute or Compute()
    model, url = endpoint_of(spec)
    family = format_of(model) if spec.name in ("vlm", VLLM) else spec.name
    echo_once(f"judge {model}: asked in the format {family!r}")
    return VLMJudge(
        model,
        url,
        folder,
        compute.in_flight,
        compute.max_tokens,
        family=family,
        shown=shown or (1 if spec.alone else 2),
        side=compute.judge_side,
        images=compute.judge_images,
    )
