"""The integer tables of a model, made once at export from its float prior and shipped with the weights."""

from __future__ import annotations

from lic.coder import SCALES, Tables, gaussian_tables
from lic.model.codec import CodecModel
from lic.model.context.base import FRACTIONS
from lic.model.hyperprior import Z_LIMIT


def make_tables(net: CodecModel) -> tuple[Tables, Tables]:
    """(tables of y: rows scale·8 + fraction, tables of z: rows bucket·C + channel)."""
    pmfs = list(net.prior.pmf().flatten(0, 1).cpu().numpy())
    return gaussian_tables(SCALES, FRACTIONS), Tables.from_pmfs(pmfs, [-Z_LIMIT] * len(pmfs))
