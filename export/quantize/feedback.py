"""Rounding that makes up for itself: what one weight is moved by, later weights of its output take back.

Letters: K what a product sums over, N outputs, X (T, K) the inputs that a product really gets, H = X^T X (K, K).

    nearest    the least ‖W - W'‖
    feedback   a small ‖X (W - W')‖: weight k of all outputs is rounded, and what it was moved by, e, goes to k+1 .. K:
                   W[j] -= e * U[k, j] / U[k, k]        U upper triangular, U^T U = inv(H)

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), section 3.3. The scale of a block is fitted when its first weight is reached, to what the weights
are by then. Weights that lie on a grid already are not moved, and nothing is fed back.

An expert has few tokens: often fewer than K, which say nothing of most directions, and wrong things of others. So H / T
is shrunk towards a multiple of I by as much as its own spread says that it is off by chance (Ledoit and Wolf 2004, "A
well-conditioned estimator for large-dimensional covariance matrices", section 3.2). Of inputs without any correlation
nothing is left, and rounding is to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_export.export.quantize.rounding import Array, Rounded, block_of, encoded, fitted
from moe_export.export.quantize.scheme import Scheme

_RAISED = 0.01
"""By how much of its mean the diagonal of H is raised at least, as in the paper."""
_TOGETHER = 128
"""Weights of an output that are rounded before what they were moved by is taken off all later ones, in one product."""


@dataclass(eq=False)
class Moments:
    """What is known of the inputs of one product.

    Attributes:
        products: The sum of x x^T of its tokens, (K, K) float64.
        fourth: The sum of (x^T x)^2.
        tokens: How many there were.
    """

    products: Array
    fourth: float = 0.0
    tokens: int = 0

    @classmethod
    def none(cls, size: int) -> Moments:
        """Of no tokens yet."""
        return cls(np.zeros((size, size)))

    def add(self, rows: Array) -> None:
        """Add tokens (T, K), of any float type."""
        wide = rows.astype(np.float64)
        self.products += wide.T @ wide
        self.fourth += float(np.square(np.square(wide).sum(1)).sum())
        self.tokens += len(rows)

    def shrunk(self) -> Array:
        """H / T, shrunk (see the module's docstring) and raised; I if there were no tokens."""
        size, count = len(self.products), max(self.tokens, 1)
        mean = float(np.trace(self.products)) / size / count
        if mean == 0:  # no tokens, or none but zeros
            return np.eye(size)
        sample = self.products / count
        spread = (self.fourth / count - float(np.square(sample).sum())) / max(count - 1, 1)
        distance = float(np.square(sample - mean * np.eye(size)).sum())
        share = min(1.0, spread / distance) if distance and count > 1 else 1.0
        return (1 - share) * sample + (share + _RAISED) * mean * np.eye(size)


def rounded_with_feedback(weight: Array, scheme: Scheme, moments: Moments, wide: np.dtype[Any]) -> Rounded:
    """Put a weight (K, N) on grids with the least error on what it is multiplied with.

    Args:
        weight: Of any float type.
        scheme: The grid.
        moments: Of its inputs.
        wide: The type of the scales.
    """
    size, kind = len(weight), weight.dtype
    upper = _upper(moments.shrunk())
    left = weight.astype(np.float64)  # what is still to be rounded, with what it takes back
    codes = np.empty(weight.shape, np.float32)
    block = block_of(size, scheme)
    whole = Scheme(scheme.packing, None, scheme.zero_points, scheme.tensorrt)  # of one block
    scales, zeros = [], []
    for start in range(0, size, min(block, _TOGETHER)):
        stop = min(start + min(block, _TOGETHER), size)
        if start % block == 0:
            grid = fitted(left[start : start + block].astype(kind), 0, whole, wide)
            scales.append(grid.scales)
            zeros.append(grid.zeros)
        moved = np.empty((stop - start, weight.shape[1]))
        for at in range(start, stop):
            row = left[at : at + 1].astype(np.float32)
            codes[at] = encoded(row, 0, scales[-1], zeros[-1], whole)[0]
            zero = 0 if zeros[-1] is None else zeros[-1][0]
            value = ((codes[at] - zero) * scales[-1][0]).astype(kind).astype(np.float64)
            moved[at - start] = (left[at] - value) / upper[at, at]
            left[at + 1 : stop] -= np.outer(upper[at, at + 1 : stop], moved[at - start])
        left[stop:] -= upper[start:stop, stop:].T @ moved
    found = [zero for zero in zeros if zero is not None]
    return Rounded(codes, np.concatenate(scales), np.concatenate(found) if found else None, block)


def _upper(products: Array) -> Array:
    """U (K, K) with U^T U = inv(H)."""
    lower = np.linalg.inv(np.linalg.cholesky(products))
    found: Array = np.linalg.cholesky(lower.T @ lower).T
    return found
