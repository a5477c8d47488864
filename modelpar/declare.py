"""How a setting is declared: its default, the values that are allowed, and what it means.

``--help`` prints the declarations, and ``docs/`` repeats them in its tables.  ``means`` is a text
in Markdown without links.  ``unit`` describes the values where there is no list of them.
``unset`` says what stands for a default that is not a fixed value.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING


def at_least(
    minimum: float, default: Any = MISSING, *, below: float = math.inf, **about: Any
) -> Any:
    """Declare a finite number, ``minimum`` or more; with a tuple as default, a list of them."""
    return declare(default, minimum=minimum, below=below, **about)


def one_of(*choices: object, default: Any = MISSING, **about: Any) -> Any:
    """Declare one of a few values; with a tuple as default, a list of them."""
    return declare(default, choices=choices, **about)


def path(default: Any = MISSING, *words: str, **about: Any) -> Any:
    """Declare a path of this machine, see ``config.typed``; ``words`` are no paths."""
    return declare(default, path=words, **about)


def declare(default: Any, **metadata: Any) -> Any:
    """Declare a setting; its default is a list for a tuple, and a copy for a dictionary.

    ``filled``: a list must not be empty.  ``keys``: of a group of settings, those that matter.
    """
    if isinstance(default, tuple):
        return field(default_factory=lambda: [*default], metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: {**default}, metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Yield the dotted key, the field and the value of each setting."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, value


def flatten(settings: Any) -> dict[str, Any]:
    """Return the settings by dotted key."""
    return {key: value for key, _, value in walk(settings)}


# -- the texts of a setting, in Markdown ----------------------------------------------------------


def values_text(entry: "Field[Any]") -> str:
    """Return which values a setting may have; nothing if its default shows that."""
    about = entry.metadata
    if about.get("path"):
        return ", ".join([*(f"`{word}`" for word in about["path"]), "PATH"])
    if "choices" in about:
        choices = ", ".join(f"`{choice}`" for choice in about["choices"])
        return f"list of {choices}" if "list" in str(entry.type) else choices
    return about.get("unit", "")


def default_text(entry: "Field[Any]", default: Any) -> str:
    """Return the default of a setting, or what stands for it."""
    if "unset" in entry.metadata:
        return entry.metadata["unset"]
    if default is None or default == MISSING:
        return "none" if default is None else "required"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list):
        return f"`[{','.join(map(str, default))}]`"
    return f"`{default}`"
