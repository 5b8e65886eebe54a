"""FiFA's importance of a pair: margin, text quality and text diversity on one scale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fifa.recipe import Select
from fifa.select.order import midranks

Floats = npt.NDArray[np.float32]


def importance(
    margin: Floats | None, quality: Floats | None, diversity: Floats | None, knobs: Select
) -> Floats:
    """The importance of every eligible pair (arXiv 2410.10166).

    Parameters
    ----------
    margin, quality, diversity
        float32 [eligible pairs], finite; None where there is no such score, which is then
        absent from the sum; at least one is there.
    knobs
        ``alpha``, ``gamma`` and ``normalize``.

    Returns
    -------
    float32 [eligible pairs].
    """
    terms = [(1.0, margin), (knobs.alpha, quality), (knobs.gamma, diversity)]
    total = np.zeros(next(len(term) for _, term in terms if term is not None), np.float64)
    for weight, term in terms:
        if term is not None and weight > 0:
            # I_i = m^_i + alpha * q^_c + gamma * h^_c
            total += weight * normalized(term, knobs.normalize)
    return total.astype(np.float32)


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
    if how == "rank":
        if values.min() == values.max():
            return np.zeros(len(values))
        # x^ = (midrank(x) - 1/2) / n, in (0, 1)
        return (midranks(values) - 0.5) / len(values)
    centre, unit = _scale(values, how)
    result = values.astype(np.float64)
    result -= centre
    result /= unit
    return result


def _scale(values: Floats, how: str) -> tuple[float, float]:
    """What a term is centred on and divided by."""
    if how == "none":
        return 0.0, 1.0
    ordered = np.sort(values)  # what is computed from it does not depend on the rows' order
    if ordered[0] == ordered[-1]:
        return float(ordered[0]), 1.0
    if how == "robust":
        # x^ = (x - median) / (IQR / 1.349): 1.349 is the IQR of a standard normal, so that the
        # unit is a standard deviation again.
        low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        if high > low:
            return median, (high - low) / 1.349
    # x^ = (x - mean) / standard deviation
    mean = float(ordered.mean(dtype=np.float64))
    deviation = float(np.sqrt(np.mean(np.subtract(ordered, mean, dtype=np.float64) ** 2)))
    # Half the values equal can make the IQR 0: then the unit is the standard deviation.
    return (median, deviation) if how == "robust" else (mean, deviation)


def _quantile(ordered: Floats, share: float) -> float:
    place, beyond = divmod(share * (len(ordered) - 1), 1)
    first = float(ordered[int(place)])
    return first + beyond * (float(ordered[min(int(place) + 1, len(ordered) - 1)]) - first)
