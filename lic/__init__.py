"""lic: a learned image codec.

``import lic`` is cheap: torch is imported when the first picture is coded, never before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lic.errors import CorruptError, LicError, UnsupportedError, UsageError
from lic.rate import Target

__version__ = "0.1.0.dev0"

__all__ = [
    "Codec",
    "CorruptError",
    "LicError",
    "Target",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "decode",
    "encode",
    "info",
]

if TYPE_CHECKING:
    from lic.api import Codec, decode, encode, info


def __getattr__(name: str) -> Any:
    # lic.api brings in numpy and Pillow, which `lic --help` does not need.
    if name in ("Codec", "decode", "encode", "info"):
        from lic import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
