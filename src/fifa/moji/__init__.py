"""A text-to-image world small enough for a CPU, in which the truth is known.

Its pictures are emoji on plain backgrounds, its captions say which on what, and its models are
of the real classes: a `diffusers.StableDiffusionPipeline`, a `transformers.CLIPModel`. People
are simulated, by a hidden utility that selection never sees. `docs/moji.md` explains what that
can show about real feedback and what it cannot.
"""
