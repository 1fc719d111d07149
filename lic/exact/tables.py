"""Elementary functions as integer tables.

Every entry is a real number rounded to the nearest integer, and none lies near a tie (a test measures the margin), so
that every machine's floating point gives the same table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOGIT_BITS = 5  # unit of attention logits: 1/32
EXP_LIMIT = 512  # exp(0)
EXP: npt.NDArray[np.int64] = np.rint(EXP_LIMIT * np.exp(np.arange(256) / -(2**LOGIT_BITS))).astype(np.int64)
"""EXP[d] = 512·exp(-d/32): weight of a key whose logit lies d/32 below the largest; 0 at the end."""

RATIO_BITS, LOG_BITS = 10, 7  # units of |ŷ / unit| and of its logarithm
RATIO_LIMIT = 16 << RATIO_BITS
LOG: npt.NDArray[np.int64] = np.rint(2**LOG_BITS * np.log1p(8 * np.arange(RATIO_LIMIT + 1) / 2**RATIO_BITS)).astype(
    np.int64
)
"""LOG[i] = 128·ln(1 + 8·i/1024)."""

EXP2_INDEX_BITS, EXP2_BITS = 12, 14
MAX_LOG2 = 16 << EXP2_INDEX_BITS  # magnitude of the logarithm of a unit
_EXPONENTS = EXP2_BITS + np.arange(1 << EXP2_INDEX_BITS) / 2**EXP2_INDEX_BITS
EXP2: npt.NDArray[np.int64] = np.rint(np.exp2(_EXPONENTS)).astype(np.int64)
"""EXP2[i] = 2**(14 + i/4096): mantissas of powers of two."""
