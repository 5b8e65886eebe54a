"""FiFA's importance of a pair: margin, text quality and text diversity on one scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.config import Select
from fifa.selection.order import midranks

Floats = npt.NDArray[np.float32]
BLOCK = 1 << 18  # pairs at a time: the temporaries stay in the processor's cache


def importance(
    margin: Floats | None, quality: Floats | None, diversity: Floats | None, knobs: Select, n: int
) -> Floats:
    """The importance of every eligible pair (arXiv 2410.10166).

    Parameters
    ----------
    margin, quality, diversity
        float32 [n], finite; None where there is no such score, which is then absent from the sum.
    knobs
        ``alpha``, ``gamma`` and ``normalize``.
    n
        How many pairs are eligible.

    Returns
    -------
    float32 [n]; zeros where there is no score at all.
    """
    terms = [(1.0, margin), (knobs.alpha, quality), (knobs.gamma, diversity)]
    result = np.zeros(n, np.float32)
    scaled = [
        (weight, *_scale(term, knobs.normalize))
        for weight, term in terms
        if term is not None and weight > 0
    ]
    for start in range(0, len(result), BLOCK):
        part = slice(start, start + BLOCK)
        # I_i = m^_i + alpha * q^_c + gamma * h^_c
        total = np.zeros(len(result[part]), np.float64)
        for weight, values, centre, unit in scaled:
            total += weight * ((values[part].astype(np.float64) - centre) / unit)
        result[part] = total
    return result


def normalized(values: Floats, how: str) -> npt.NDArray[np.float64]:
    """One term on the common scale.

    Parameters
    ----------
    values
        float32 [eligible pairs], finite: a prompt's value counts once for each of its pairs.
    how
        ``none``, ``z``, ``rank`` or ``robust``; see the comments.

    Returns
    -------
    float64 [eligible pairs]; zeros where the values are all equal and ``how`` is not ``none``.
    The same value has the same result whatever the order of the pairs.
    """
    values, centre, unit = _scale(values, how)
    return np.asarray((values.astype(np.float64) - centre) / unit)


def _scale(values: Floats, how: str) -> tuple[npt.NDArray[np.floating[Any]], float, float]:
    """``(values, centre, unit)``, so that ``(values - centre) / unit`` is the normalised term."""
    if how == "none":
        return values, 0.0, 1.0
    ordered = np.sort(values)  # what is computed from it does not depend on the rows' order
    if ordered[0] == ordered[-1]:
        return values, float(ordered[0]), 1.0
    if how == "rank":
        # x^ = (midrank(x) - 1/2) / n, in (0, 1)
        return midranks(values), 0.5, float(len(values))
    if how == "robust":
        # x^ = (x - median) / (IQR / 1.349): 1.349 is the IQR of a standard normal, so that the
        # unit is a standard deviation again.
        low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        if high > low:
            return values, median, (high - low) / 1.349
    # x^ = (x - mean) / standard deviation
    mean = float(ordered.mean(dtype=np.float64))
    deviation = float(np.sqrt(np.mean(np.subtract(ordered, mean, dtype=np.float64) ** 2)))
    # Half the values equal can make the IQR 0: then the unit is the standard deviation.
    return values, median if how == "robust" else mean, deviation


def _quantile(ordered: Floats, share: float) -> float:
    place, beyond = divmod(share * (len(ordered) - 1), 1)
    first = float(ordered[int(place)])
    return first + beyond * (float(ordered[min(int(place) + 1, len(ordered) - 1)]) - first)
