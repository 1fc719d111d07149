"""Exact integer arithmetic for the entropy path: the same symbols on every machine (docs/exactness.md).

Activations and weights are integers held as floats; every product and every partial sum stays below 2**24 in
magnitude, so float32 computes them without error in whatever order. `layers` has one definition of each layer for
training, export and inference, `oracle` the same in int64.
"""

from lic.exact.arithmetic import KERNELS, exact_arithmetic, known_answer, selected_kernel, use_kernel
from lic.exact.fixed import ACCUMULATOR, MAX_BITS, Fixed, Grid, round_ste
from lic.exact.layers import (
    MAX_EXPONENT,
    SLOPE,
    Depthwise,
    Linear,
    QualityTable,
    attend,
    freeze,
    interpolate,
    power_of_two,
)
from lic.exact.tables import MAX_LOG2

__all__ = [
    "ACCUMULATOR",
    "KERNELS",
    "MAX_BITS",
    "MAX_EXPONENT",
    "MAX_LOG2",
    "SLOPE",
    "Depthwise",
    "Fixed",
    "Grid",
    "Linear",
    "QualityTable",
    "attend",
    "exact_arithmetic",
    "freeze",
    "interpolate",
    "known_answer",
    "power_of_two",
    "round_ste",
    "selected_kernel",
    "use_kernel",
]
