"""The integer tables of a model, made once at export from its float prior and shipped with the weights."""

from __future__ import annotations

import math

import numpy as np

from lic.coder import SCALES, Tables, gaussian_tables
from lic.model.codec import CodecModel
from lic.model.hyperprior import Z_LIMIT

FRACTIONS = 8
TAIL = 2.0**-17  # outcomes of z rarer than this are left to the escape


def make_tables(net: CodecModel) -> tuple[Tables, Tables]:
    """(tables of y: rows scale·8 + fraction, tables of z: rows bucket·C + channel)."""
    rows = net.prior.pmf().flatten(0, 1).cpu().numpy()
    pmfs, offsets = [], []
    for pmf in rows:
        likely = np.flatnonzero(pmf >= TAIL)
        first, last = (likely[0], likely[-1]) if len(likely) else (Z_LIMIT, Z_LIMIT)
        pmfs.append(pmf[first : last + 1])
        offsets.append(int(first) - Z_LIMIT)
    return gaussian_tables(SCALES, FRACTIONS), Tables.from_pmfs(pmfs, offsets)


LOG_SCALE_0 = math.log(SCALES[0])
LOG_SCALE_STEP = math.log(SCALES[1] / SCALES[0])
