"""How often a margin agrees with the people: the noise of a data set, and what a cut buys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


class Agreement(NamedTuple):
    """The share of pairs where the margin agrees with the person, and its 95 % interval."""

    share: float
    low: float
    high: float
    n: int


def wilson(agreed: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927); (NaN, NaN) for no pairs.

    Inside [0, 1] and honest for few pairs and for shares near 1, unlike the normal interval.

    Parameters
    ----------
    agreed
        How many agreed; ties counted half.
    n
        Of how many.
    """
    if n == 0:
        return float("nan"), float("nan")
    share = agreed / n
    # (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    middle = share + Z95**2 / (2 * n)
    half = Z95 * float(np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)))
    scale = 1 + Z95**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def agreement(signed_margin: npt.NDArray[Any]) -> Agreement:
    """How often the margin agrees with the person.

    Parameters
    ----------
    signed_margin
        Positive where it agrees, float32 [pairs]. NaN (a tie of the person's, a pair not
        scored) is left out; 0 (the scorer sees no difference) counts half.
    """
    known = signed_margin[~np.isnan(signed_margin)]
    agreed = float((known > 0).sum() + 0.5 * (known == 0).sum())
    n = len(known)
    return Agreement(agreed / n if n else float("nan"), *wilson(agreed, n), n)


def by_margin(signed_margin: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The signed margins that are known, the largest absolute ones first, [known pairs]."""
    known = signed_margin[~np.isnan(signed_margin)]
    ordered: npt.NDArray[Any] = known[np.argsort(-np.abs(known), kind="stable")]
    return ordered


def agreement_by_margin(
    signed_margin: npt.NDArray[Any],
    fractions: Iterable[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
) -> pa.Table:
    """Agreement with the people among the pairs of largest margin.

    Parameters
    ----------
    signed_margin
        As `fifa.scoring.margin.committee` gives it, float32 [pairs]; pairs without one are left
        out.
    fractions
        Which parts of the rest to look at, each in (0, 1]; rounded to whole pairs, at least 1.

    Returns
    -------
    pyarrow.Table
        A row a fraction: ``fraction``, ``n`` (pairs in it), ``threshold`` (their smallest
        margin), ``share``, ``low``, ``high`` (a 95 % Wilson interval), all float64 but ``n``.
    """
    ordered = by_margin(signed_margin)
    # a pair that agrees counts 1, one without a difference 1/2
    agreed = np.cumsum(np.sign(ordered) + 1, dtype=np.float64) / 2
    rows = []
    for fraction in fractions if len(ordered) else ():
        n = min(len(ordered), max(1, round(fraction * len(ordered))))
        share, threshold = float(agreed[n - 1]) / n, abs(float(ordered[n - 1]))
        rows.append((fraction, n, threshold, share, *wilson(float(agreed[n - 1]), n)))
    names = ("fraction", "n", "threshold", "share", "low", "high")
    schema = pa.schema([(name, pa.int64() if name == "n" else pa.float64()) for name in names])
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema)
