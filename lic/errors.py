"""Every failure a user can meet, each with the exit code that the command line gives it.

| code | meaning |
|---|---|
| 0 | done |
| 1 | an operation failed: file, data, device |
| 2 | usage |
| 3 | not a ``.lic`` file, or a damaged one |
| 4 | a ``.lic`` file that this version cannot read: newer format, model not installed |
| 130 | interrupted |
"""

from __future__ import annotations


class LicError(Exception):
    """An operation failed. The message is one line and says, where possible, what to do."""

    exit_code = 1


class UsageError(LicError):
    """The arguments do not make sense together."""

    exit_code = 2


class CorruptError(LicError):
    """The data is not a ``.lic`` file, or a damaged one."""

    exit_code = 3


class UnsupportedError(LicError):
    """A whole ``.lic`` file that this installation cannot read."""

    exit_code = 4
