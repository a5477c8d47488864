"""Limits of the system that a process has met: which one, its size, and how to raise it."""

import errno
import re
import resource
from typing import Final

# Of a process.  More than a host has cores, and many more make it unresponsive.
THREADS: Final = 1024
# Pattern of the message, limit, unit, fix, and the line where there is no limit.
LIMITS: Final = (
    (
        r"too many open files",
        resource.RLIMIT_NOFILE,
        "open files",
        "raise ulimit -n",
        "this host can open no more files",
    ),
    (
        r"start new thread|resource temporarily unavailable|pthread_create",
        resource.RLIMIT_NPROC,
        "processes and threads of one user",
        "raise ulimit -u, or use fewer workers",
        "this host can start no more processes or threads; use fewer workers",
    ),
    (
        r"file too large",
        resource.RLIMIT_FSIZE,
        "bytes in one file",
        "raise ulimit -f",
        "the file system allows no larger file; use another one",
    ),
    (
        r"map segment|bad_alloc|can't allocate memory|cannot allocate memory",
        resource.RLIMIT_AS,
        "bytes of memory in one process",
        "raise ulimit -v, or use a smaller batch_size",
        "this host has no memory left; use a smaller batch_size, or fewer workers",
    ),
)
CODES: Final = {  # whose texts depend on the language of the system
    errno.EMFILE: "too many open files",
    errno.EAGAIN: "resource temporarily unavailable",
    errno.EFBIG: "file too large",
    errno.ENOMEM: "cannot allocate memory",
}


def reached(error: BaseException) -> str:
    """Return a line about the limit that ``error`` comes from, or an empty string."""
    if not isinstance(error, (OSError, RuntimeError, ImportError, MemoryError)):
        return ""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    text = CODES.get(code or 0) or f"{error} {error.__cause__ or ''}".lower()
    if re.search("shared memory.*no space left", text, re.DOTALL):
        return "shared memory is full; make it larger (docker run --shm-size)"
    for pattern, number, what, fix, unlimited in LIMITS:
        if re.search(pattern, text):
            size = resource.getrlimit(number)[0]
            if size == resource.RLIM_INFINITY:
                return unlimited
            return f"the system allows {size} {what}; {fix}"
    return ""
