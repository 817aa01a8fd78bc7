"""Which errors of disks and networks may be gone at another start."""

from __future__ import annotations

import errno

_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EREMOTEIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ENOMEM,
}


class PassingError(OSError):
    """Such an error, in the words of another process or of a caller."""

    passing = True


def may_pass(error: BaseException) -> bool:
    """Whether it is a fault of a machine, a disk or a network, not of what the program was given: a full disk or a
    missing file will be met again, a network file system that was away for a moment will not."""
    return isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and (error.errno in _PASSING or getattr(error, "passing", False))
    )
