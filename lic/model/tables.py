"""The integer tables of a model, made once at export from its float prior and shipped with the weights."""

from __future__ import annotations

from lic.coder import SCALES, Tables, gaussian_tables
from lic.model.codec import CodecModel
from lic.model.context.base import FRACTIONS
from lic.model.hyperprior import Z_LIMIT


def make_tables(net: CodecModel) -> tuple[Tables, Tables]:
    """(tables of y: those of :class:`Dependent` or rows scale·8 + fraction, tables of z: rows bucket·C + channel)."""
    y_tables = gaussian_tables(SCALES, FRACTIONS) if net.dependent is None else net.dependent.tables
    pmfs = list(net.prior.pmf().flatten(0, 1).cpu().numpy())
    return y_tables, Tables.from_pmfs(pmfs, [-Z_LIMIT] * len(pmfs))
