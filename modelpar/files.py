"""Files that are whole or absent, and the checks before a run writes any."""

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Final

from modelpar import limits
from modelpar.errors import CheckpointError, LaunchError, SettingsError, one_line

ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # s3://, and its form without a /
SPARE: Final = 1.1  # free space that is required, as a multiple of what will be written


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path``, which is either whole or as it was before; raises OSError.

    What is no UTF-8, as in names of files and classes, is written as an escape.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # after a power cut an unsynced file may be empty
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def local_path(key: str, text: str, *, required: bool = False) -> Path:
    """Return the path that a setting names, absolute and with ``~`` expanded.

    Raises SettingsError for an empty text, an address such as ``s3://...``, and an unknown home.
    """
    if not text.strip():
        other = "" if required else f", or leave {key} out"
        raise SettingsError(f"{key}: empty, as from an unset variable; use a path{other}")
    if ADDRESS.match(text):
        raise SettingsError(f"{key}={text}: is an address; use a path of this machine")
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path would drop ./ before a ~
    if expanded.startswith("~"):
        fix = f"use an absolute path, or ./{text} for one that begins here"
        raise SettingsError(f"{key}={text}: no such home folder; {fix}")
    return Path(expanded).absolute()


def matches(pattern: str) -> list[str]:
    """Return the sorted paths that a glob names; brackets in the name of a path are no pattern."""
    if os.path.lexists(pattern):
        return [pattern]
    return sorted(glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute


def write_texts(out: str, texts: Mapping[str, str]) -> None:
    """Create the folder ``out`` and write a file of each name in it; raises OSError."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        atomic_write(Path(out, name), f"{text.rstrip()}\n")


def write_out(out: str, content: bytes | str) -> None:
    """Write the file that ``out`` names; raises CheckpointError."""
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        if line := limits.reached(error):
            raise LaunchError(f"out={out}: {line}") from None
        raise CheckpointError(f"out={out}: not written ({one_line(error)})") from None


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _existing_parent(path: Path) -> Path:
    """Return ``path`` or its closest parent that exists; raises OSError."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_space(
    folder: Path, needed: int, what: str = "a checkpoint", key: str = "run_dir"
) -> None:
    """Raise CheckpointError where the disk of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(_existing_parent(folder)).free
    if free < needed * SPARE:
        raise CheckpointError(
            f"{folder}: {what} needs {needed * SPARE / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
            f"free; free some space or use another {key}"
        )


def check_file_size(folder: Path, size: int) -> None:
    """Raise LaunchError where the system does not allow a file of ``size`` bytes."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size > allowed != resource.RLIM_INFINITY:
        raise LaunchError(
            f"{folder}: a checkpoint has files of {size} bytes, and the system allows "
            f"{allowed} bytes in one file; raise ulimit -f"
        )


def try_writing(folder: Path) -> None:
    """Create ``folder`` and, for a moment, a file in it; raises OSError where that fails."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_folder(key: str, folder: Path) -> Path:
    """Return ``folder`` or its closest parent that exists; raises SettingsError for a file."""
    try:
        existing = _existing_parent(folder)
    except OSError as error:
        raise SettingsError(f"{key}={folder}: {error.strerror}; use another folder") from None
    if not existing.is_dir():
        raise SettingsError(f"{key}={folder}: {existing} is a file; use a folder")
    return existing


def check_writable(key: str, folder: Path) -> None:
    """Raise SettingsError where the setting ``key`` names a folder that cannot be written."""
    existing = check_folder(key, folder)
    if not os.access(existing, os.W_OK):
        raise SettingsError(f"{key}={folder}: {existing} is not writable; use another folder")
