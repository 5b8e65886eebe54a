"""A small Bradley-Terry head on frozen features: convex, so there is one answer and no luck.

And what it learns from: people's comparisons, dealt into folds over prompts, so that nothing is
judged by a model that saw its label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Reward
from fifa.console import echo
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import digest

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Loss = Callable[[Array], tuple[float, Array]]  # at a place: its value and its gradient

IMAGE_AXES, PROMPT_AXES = 16, 8  # directions of image and prompt features that are multiplied
GAIN = 0.3  # of the products beside the image's own features
TOLERANCE = 1e-6  # of the gradient, in coordinates where the Hessian at 0 is the unit matrix
BLOCK = 2048  # pairs whose products are added up at once


@dataclass(frozen=True)
class Comparisons:
    """What people said, pair by pair.

    Parameters
    ----------
    image
        The image on either side, a row of the image features, int64 [pairs, 2].
    prompt
        A row of the prompt features, int64 [pairs].
    label
        The probability that a person prefers the first image, float64 [pairs].
    """

    image: Integers
    prompt: Integers
    label: Array

    @classmethod
    def of(
        cls, pairs: Pairs, of_pair: Integers, unreadable: npt.NDArray[np.bool_]
    ) -> tuple[Comparisons, npt.NDArray[np.bool_]]:
        """All of ``pairs``, and which of them have both images.

        Parameters
        ----------
        pairs
            Their prompts and labels.
        of_pair
            Their images, int64 [pairs, 2].
        unreadable
            Which images cannot be read, bool [images].
        """
        prompt = pairs.table["prompt_index"].to_numpy().astype(np.int64)
        label = pairs.table["label"].to_numpy().astype(np.float64)
        readable = ~(unreadable[of_pair[:, 0]] | unreadable[of_pair[:, 1]])
        return cls(of_pair, prompt, label), readable

    def part(self, chosen: npt.NDArray[np.bool_] | Integers) -> Comparisons:
        """Some of the pairs."""
        return Comparisons(self.image[chosen], self.prompt[chosen], self.label[chosen])


@dataclass(frozen=True)
class Head:
    """The reward of an image x for a prompt t, on frozen features::

        (a, v) = x A + a_0,   u = t B + b_0,   reward = a + v . u

    ``a`` says how good the picture is, ``v . u`` how that depends on the prompt: products of a
    few directions of both and, where both lie in the one space of a CLIP, their similarity.
    Without either the head does not read the prompt.

    Parameters
    ----------
    image, image_bias
        A and a_0, float64 [d, 1 + p] and [1 + p].
    prompt, prompt_bias
        B and b_0, float64 [t, p] and [p].
    """

    image: Array
    image_bias: Array
    prompt: Array
    prompt_bias: Array

    @property
    def reads_prompts(self) -> bool:
        """False for a reward of the image alone."""
        return bool(self.prompt.shape[1])

    def rewards(self, images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32]) -> Array:
        """The reward of image i for prompt i, float64 [n]."""
        joint = images @ self.image + self.image_bias
        own = joint[:, 0]
        if self.reads_prompts:
            own = own + (joint[:, 1:] * (prompts @ self.prompt + self.prompt_bias)).sum(1)
        return np.asarray(own, np.float64)

    def logits(
        self, images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32], of: Comparisons
    ) -> Array:
        """reward_0 - reward_1 of every pair, float64 [pairs]; NaN where an image is missing."""
        first, second = (self.rewards(images[of.image[:, s]], prompts[of.prompt]) for s in (0, 1))
        return first - second

    def over(self, temperature: float) -> Head:
        """The head with its rewards divided by ``temperature``."""
        return Head(
            np.concatenate([self.image[:, :1] / temperature, self.image[:, 1:]], 1),
            np.concatenate([self.image_bias[:1] / temperature, self.image_bias[1:]]),
            self.prompt / temperature,
            self.prompt_bias / temperature,
        )


def prompt_weights(prompt: Integers) -> Array:
    """1 / (examples of its prompt) for every pair, as PickScore is trained, float64 [pairs]."""
    _, codes, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    weights: Array = 1.0 / counts[codes.reshape(-1)]
    return weights


def prompt_folds(
    prompt_ids: pa.ChunkedArray | pa.Array,
    prompt: Integers,
    images: Integers,
    *,
    folds: int = Reward.folds,
    seed: int = 0,
) -> Integers:
    """A fold for every prompt.

    Prompts that share an image go together, for a person's verdict on an image under one prompt
    says something of it under another. They are dealt out in the order of a hash of ``(seed,
    prompt_id)``, each group to the fold with the fewest pairs: the same prompts with the same
    pairs get the same folds, wherever they stand in the table. Where so many prompts hang
    together that a group would be larger than two folds, groups are given up, with a warning.

    Parameters
    ----------
    prompt_ids
        `Pairs.prompts`' ids, [prompts].
    prompt
        Of every pair: its row in ``prompt_ids``, int64 [pairs].
    images
        Of every pair: what tells its two images apart, int64 [pairs, 2].
    folds
        How many, at least 2.
    seed
        Another one gives other folds.

    Returns
    -------
    numpy.ndarray
        int64 [prompts], 0 to folds - 1; -1 for a prompt without pairs.

    Raises `FifaError` for fewer prompts with pairs than folds.
    """
    present = np.unique(prompt)
    if folds < 2 or len(present) < folds:
        raise FifaError(
            f"{folds} folds need as many prompts; there are {len(present)}",
            do="fewer folds (at least 2), or more data",
        )
    pairs_of = np.bincount(prompt, minlength=len(prompt_ids))
    group = _groups(prompt, images, len(prompt_ids))
    size = np.bincount(group, weights=pairs_of)
    several = len(np.unique(group[present])) < folds
    if several or size.max() > max(2 * len(prompt) / folds, pairs_of.max()):
        echo("too many prompts share images: folds keep prompts together, but not images")
        group = np.arange(len(prompt_ids))
    ids = prompt_ids.to_pylist()
    rank = {int(p): digest(seed, ids[p]) for p in present}
    members: dict[int, list[int]] = {}
    for p in sorted(rank, key=lambda p: (rank[p], ids[p])):
        members.setdefault(int(group[p]), []).append(p)
    fold = np.full(len(prompt_ids), -1, np.int64)
    load = np.zeros(folds, np.int64)
    for prompts in members.values():
        target = int(load.argmin())
        fold[prompts] = target
        load[target] += pairs_of[prompts].sum()
    return fold


class HeadPath:
    """A head to be fitted under one penalty after the other.

    Every image feature is brought to mean 0 and deviation 1 over the training images, divided by
    sqrt(d); the products are those of the first principal components, likewise scaled, times
    `GAIN`. The loss is that of PickScore: softmax cross-entropy of the two rewards against
    ``(label, 1 - label)``, each pair weighted by `prompt_weights`, and half the penalty times the
    squared length of the coefficients.

    Parameters
    ----------
    images, prompts
        Features, float32 [images, d] and [prompts, t].
    data
        The pairs to learn from; every image of theirs has features.
    reads_prompts
        Multiply directions of images and prompts, too.
    shared
        Images and prompts are embedded in one space, so x . t says how well they fit: a feature
        of its own, brought to mean 0 and deviation 1. Counts only where prompts are read.
    """

    def __init__(
        self,
        images: npt.NDArray[np.float32],
        prompts: npt.NDArray[np.float32],
        data: Comparisons,
        *,
        reads_prompts: bool,
        shared: bool = False,
    ) -> None:
        self._data, self._shared = data, shared and reads_prompts
        used = images[np.unique(data.image)].astype(np.float64)
        self._mean, deviation = used.mean(0), used.std(0)
        self._scale = np.where(deviation > 1e-6 * max(1.0, deviation.max()), deviation, np.inf)
        p = q = 0
        if reads_prompts:
            asked = prompts[np.unique(data.prompt)].astype(np.float64)
            self._prompt_mean = asked.mean(0)
            self._image_axes = _axes((used - self._mean) / self._scale, IMAGE_AXES)
            self._prompt_axes = _axes(asked - self._prompt_mean, PROMPT_AXES)
            p, q = self._image_axes.shape[1], self._prompt_axes.shape[1]
        else:
            self._prompt_mean = np.zeros(prompts.shape[1])
            self._image_axes = np.empty((used.shape[1], 0))
            self._prompt_axes = np.empty((prompts.shape[1], 0))
        self._shape = (p, q)
        weight = prompt_weights(data.prompt)
        self._weight = weight / weight.sum()
        self._design(images, prompts)
        self._hessian = self._curvature()
        self._at = np.zeros(self._x.shape[1])

    def fit(self, penalty: float) -> Head:
        """The head under a penalty, from where the last one ended."""
        curvature = self._hessian + penalty * np.eye(len(self._at))
        self._at = _minimise(partial(self._loss, penalty=penalty), self._at, curvature)
        coefficients = self._rotation @ self._at
        d, (p, q) = len(self._mean), self._shape
        # reward = (x - m)/s . w / sqrt(d) + f' M t', M scaled by GAIN / sqrt(p q)
        own = coefficients[:d] / self._scale / np.sqrt(d)
        axes = self._image_axes / self._scale[:, None]
        product = coefficients[d : d + p * q].reshape(p, q) * GAIN / np.sqrt(max(1, p * q))
        image = np.concatenate([own[:, None], axes], 1)
        prompt = self._prompt_axes @ product.T
        image_bias, prompt_bias = -self._mean @ image, -self._prompt_mean @ prompt
        if self._shared:
            # c (x . t) / s as x (I c / s) . (t I): d more directions, without a bias
            eye, none = np.eye(d), np.zeros(d)
            image = np.concatenate([image, eye * coefficients[-1] / self._spread], 1)
            prompt = np.concatenate([prompt, eye], 1)
            image_bias, prompt_bias = np.append(image_bias, none), np.append(prompt_bias, none)
        return Head(image, image_bias, prompt, prompt_bias)

    def _design(self, images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32]) -> None:
        """A row for every (image, prompt) that occurs, turned so that no column is idle."""
        data, (p, q) = self._data, self._shape
        both = data.image * max(1, len(prompts)) + data.prompt[:, None]
        rows, of_pair = np.unique(both, return_inverse=True)
        image, prompt = np.divmod(rows, max(1, len(prompts)))
        v = (images[image] - self._mean) / self._scale
        x = v / np.sqrt(v.shape[1])
        if p * q:
            f = v @ self._image_axes
            t = (prompts[prompt] - self._prompt_mean) @ self._prompt_axes
            joint = (f[:, :, None] * t[:, None, :]).reshape(len(x), p * q)
            x = np.concatenate([x, joint * GAIN / np.sqrt(p * q)], 1)
        if self._shared:
            fit = (images[image].astype(np.float64) * prompts[prompt]).sum(1)
            self._spread = max(float(fit.std()), 1e-6)
            x = np.concatenate([x, (fit - fit.mean())[:, None] / self._spread], 1)
        self._first, self._second = of_pair.reshape(-1, 2).T
        if len(data.label) < len(x):
            # A row for every pair instead, the difference of its two, beside a row of zeros
            x = np.concatenate([x[self._first] - x[self._second], np.zeros((1, x.shape[1]))])
            self._first = np.arange(len(data.label))
            self._second = np.full_like(self._first, len(data.label))
        # With fewer rows than columns x = (x Q) Q', Q orthonormal: the same fit, smaller
        self._rotation = np.eye(x.shape[1])
        if len(x) < x.shape[1]:
            self._rotation, _ = np.linalg.qr(x.T)
            x = x @ self._rotation
        self._x = x

    def _curvature(self) -> Array:
        """The Hessian at 0 without the penalty, where every pair counts a quarter of its weight.

        By products in float32, whose error stays below the millionth of the trace that is added to
        every direction: the search that it is for ends at the same place.
        """
        columns = self._x.shape[1]
        hessian, root = np.zeros((columns, columns)), np.sqrt(self._weight / 4)
        for start in range(0, len(root), BLOCK):
            block = slice(start, start + BLOCK)
            d = self._x[self._first[block]] - self._x[self._second[block]]
            d = (d * root[block, None]).astype(np.float32)
            hessian += d.T @ d
        hessian += 1e-6 * np.trace(hessian) * np.eye(columns)
        return hessian

    def _loss(self, at: Array, penalty: float) -> tuple[float, Array]:
        """The loss and its gradient."""
        reward = self._x @ at
        z = reward[self._first] - reward[self._second]
        y, w = self._data.label, self._weight
        # -y log s(z) - (1 - y) log s(-z) = log(1 + e^z) - y z, its slope s(z) - y
        loss = float(w @ (np.logaddexp(0, z) - y * z) + penalty / 2 * at @ at)
        # s(z) = (1 + tanh(z / 2)) / 2, which cannot overflow
        slope = w * (0.5 * (1 + np.tanh(z / 2)) - y)
        rows = len(self._x)
        back = np.bincount(self._first, slope, rows) - np.bincount(self._second, slope, rows)
        return loss, self._x.T @ back + penalty * at


def _groups(prompt: Integers, images: Integers, prompts: int) -> Integers:
    """The smallest prompt that each prompt hangs together with through shared images."""
    group = np.arange(prompts)
    _, image = np.unique(images, return_inverse=True)
    image = image.reshape(-1)
    of_slot = np.repeat(prompt, 2)
    while True:
        smallest = np.full(int(image.max()) + 1, prompts)
        np.minimum.at(smallest, image, group[of_slot])
        new = group.copy()
        np.minimum.at(new, of_slot, smallest[image])
        new = np.minimum(new, new[new])  # a group's group: halves the rounds
        if np.array_equal(new, group):
            return group
        group = new


def _minimise(loss: Loss, start: Array, curvature: Array) -> Array:
    """Where ``loss`` is least, from ``start`` on, by L-BFGS with a strong Wolfe line search.

    The search is for u, at = L'^-1 u with L L' = ``curvature``, float64 [columns, columns],
    positive definite: the closer it is to the loss's Hessian, the more alike all directions are
    in u, and the fewer steps it takes. Where the search ends does not depend on it.
    """
    torch = require("torch")
    triangle = np.linalg.cholesky(curvature)
    back = np.linalg.inv(triangle).T
    u = torch.from_numpy(triangle.T @ start)
    search = torch.optim.LBFGS(
        [u],
        max_iter=500,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = loss(back @ u.numpy())
        u.grad = torch.from_numpy(back.T @ gradient)
        return value

    search.step(closure)
    found: Array = back @ u.numpy()
    return found


def _axes(centred: Array, most: int) -> Array:
    """The first principal directions, each scaled so that the projection has deviation 1."""
    n, d = centred.shape
    # The eigenvectors of X'X / n, by way of those of XX' / n where that is smaller
    values, vectors = np.linalg.eigh((centred @ centred.T if n < d else centred.T @ centred) / n)
    order = np.argsort(-values)[:most]
    order = order[values[order] > 1e-9 * max(values.max(), 1e-300)]
    kept = vectors[:, order] if n >= d else centred.T @ vectors[:, order]
    kept = kept / np.linalg.norm(kept, axis=0)
    axes: Array = kept / np.sqrt(values[order])
    return axes
