r"""From which gradient on a trajectory is stationary.

After :math:`g_k` gradients a run stands at a state with value :math:`v_k`, an average over images
and chains. Its running mean over the window of :math:`W` gradients that follows is

.. math:: m_k = \mathrm{mean}\{v_j : g_k \le g_j < g_k + W\},

and the run has *settled* at the smallest :math:`g_k` such that :math:`m_j` lies in the target
interval for *all* complete windows :math:`j \ge k` to the end of the run. A crossing that does not
last therefore counts for nothing, and neither does what is seen only at the very end: without two
windows after it, :math:`g_k` is no answer.
"""

from __future__ import annotations

import numpy as np


def running_means(gradients: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """Mean of ``values`` ``(K, ...)`` in the ``window`` > 0 gradients from each state on.

    ``gradients`` are increasing counts, ``(K,)``. Windows are complete ones only, from the first
    state on: ``(K', ...)`` with K' <= K.
    """
    if not window > 0:
        raise ValueError(f"window must be positive, got {window}")
    complete = int(np.searchsorted(gradients, gradients[-1] - window, side="right"))
    ends = np.searchsorted(gradients, gradients[:complete] + window, side="left")
    means = [values[k:end].mean(0) for k, end in enumerate(ends)]
    return np.array(means, dtype=np.float64).reshape((complete, *values.shape[1:]))


def settled(
    gradients: np.ndarray, values: np.ndarray, low: float, high: float, window: int
) -> int | None:
    """Gradients after which the running mean stays in [low, high]; ``None`` if it does not.

    ``values`` are averages over images, ``(K,)``; the rest is as for :func:`running_means`.
    """
    means = running_means(gradients, values, window)
    # NaN is outside.
    outside = np.flatnonzero(~((means >= low) & (means <= high)))
    first = int(outside[-1]) + 1 if outside.size else 0
    if first >= len(means) or gradients[first] + 2 * window > gradients[-1]:
        return None
    return int(gradients[first])
