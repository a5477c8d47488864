"""``--help``: what a command does, with examples, and each of its settings.

The texts are the docstring of the command's module and the declarations of its settings.
"""

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from typing import Any, Final

from omegaconf import OmegaConf

import modelpar
from modelpar.declare import default_text, values_text
from modelpar.overrides import conf_dir
from modelpar.schemas import SCHEMAS

EXAMPLE: Final = re.compile(r"\s*(modelpar-|torchrun )")
WIDEST: Final = 100  # columns; longer lines are hard to read
KEYS: Final = 24  # columns for the keys, where there is room
GROUPS: Final = {"search": "values of settings to try in turn, with -m"}  # that are no settings
NOTE: Final = (
    "By data, by recipe, by net: set by the group's file or by model.net; --cfg job shows it. "
    "Values have the grammar of Hydra (https://hydra.cc). docs/settings.md explains more."
)
OPTIONS: Final = {
    "--cfg job": "print the settings that a command line stands for",
    "--config-dir FOLDER": "find files of your own: FOLDER/GROUP/FILE.yaml is GROUP=FILE",
    "--shell-completion install=bash": "complete keys and values in this shell: "
    'eval "$(modelpar-NAME --shell-completion install=bash)"; zsh and fish: docs/settings.md',
    "--version": "print the version",
    "--help, -h": "print this page",
}
SWEEP: Final = {"-m, --multirun": "run once for each combination of values, as in seed=0,1,2"}


def show(name: str) -> None:
    """Print the help of the command ``name``, as wide as the terminal."""
    print(page(name, shutil.get_terminal_size().columns))  # noqa: T201


def version(_name: str) -> None:
    """Print the version of this package."""
    print("modelpar", modelpar.__version__)  # noqa: T201


def page(name: str, width: int) -> str:
    """Return the help of a command for a terminal of ``width`` columns."""
    width = min(width, WIDEST)
    indent = min(KEYS, 3 * width // 10)
    about = import_module(f"modelpar.{name}").__doc__ or ""
    parser = argparse.ArgumentParser(
        usage=f"modelpar-{name} [KEY=VALUE]...",
        description=_about(about, width),
        epilog=textwrap.fill(NOTE, width),
        add_help=False,
        formatter_class=lambda prog: _Formatter(prog, width=width, max_help_position=indent),
    )
    for title, rows in _sections(name, SCHEMAS[name]()):
        section = parser.add_argument_group(textwrap.fill(title, width - 2))
        for key, text in rows:
            plain = text.replace("`", "").replace("%", "%%")  # argparse formats it
            section.add_argument(key.strip("-"), metavar=key, help=plain)
    return parser.format_help().rstrip()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no words at their hyphens, as in modelpar-train."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _about(text: str, width: int) -> str:
    """Return a module's docstring in lines of ``width``; examples remain commands in a shell."""
    found: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if EXAMPLE.match(paragraph):
            lines = (
                textwrap.wrap(
                    line.strip(), width - 6, break_long_words=False, break_on_hyphens=False
                )
                for line in paragraph.splitlines()
            )
            found.append("\n".join("  " + " \\\n    ".join(line) for line in lines))
        else:
            plain = " ".join(paragraph.split()).replace("``", "")
            found.append(textwrap.fill(plain, width, break_on_hyphens=False))
    return "\n\n".join(found)


def _sections(name: str, settings: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield a title with a key and a text in Markdown for each option or setting below it."""
    options = (SWEEP if "on_failure" in vars(settings) else {}) | OPTIONS
    yield "options", [(key, text.replace("NAME", name)) for key, text in options.items()]
    left = {entry.name: entry for entry in fields(settings)}
    groups = dict(_groups(name, settings, left))
    if groups:
        yield "groups of settings, GROUP=NAME", list(groups.items())
    nested: list[Field[Any]] = []
    for kind in type(settings).__mro__[:-1]:  # a command's own settings come first
        own = [left.pop(key) for key in inspect.get_annotations(kind) if key in left]
        nested += [entry for entry in own if is_dataclass(getattr(settings, entry.name))]
        plain = [entry for entry in own if entry not in nested and entry.name not in groups]
        rows = [(one.name, _text(one, getattr(settings, one.name))) for one in plain]
        yield _first(kind), rows
    for entry in nested:
        group = getattr(settings, entry.name)
        keys = entry.metadata.get("keys") or vars(group)
        chosen = [one for one in fields(group) if one.name in keys]
        rows = [
            (f"{entry.name}.{one.name}", _text(one, getattr(group, one.name))) for one in chosen
        ]
        yield f"{entry.name}.*: {_first(type(group))}", rows


def _groups(
    name: str, settings: Any, entries: dict[str, "Field[Any]"]
) -> Iterator[tuple[str, str]]:
    """Yield each group of a command, and a text with the names of its files."""
    defaults: Any = OmegaConf.load(conf_dir() / f"{name}.yaml")
    choices = [line for line in defaults.defaults if not isinstance(line, str)]
    for key, default in (pair for line in choices for pair in line.items()):
        group = key.removeprefix("optional ")
        if " " in group:  # override /hydra/...
            continue
        names = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
        entry = entries.get(group)
        if entry is None:
            yield group, f"{GROUPS[group]} [{names}]"
            continue
        means = entry.metadata.get("means") or _first(type(getattr(settings, group)))
        limits = _limits(values_text(entry) or names, default or default_text(entry, None))
        yield group, f"{means[0].lower()}{means[1:]} {limits}"


def _text(entry: "Field[Any]", default: Any) -> str:
    """Return what a setting means, its values and its default."""
    limits = _limits(values_text(entry), default_text(entry, default))
    return f"{entry.metadata['means']} {limits}"


def _limits(values: str, default: str) -> str:
    chosen = default if default == "required" else f"default: {default}"
    return f"[{values}; {chosen}]" if values else f"[{chosen}]"


def _first(kind: type) -> str:
    """Return the first sentence of a docstring, without its names of files."""
    text = (inspect.getdoc(kind) or "").replace("``", "")
    return re.split(r"\.\s|\.$|; conf", text, maxsplit=1)[0]
