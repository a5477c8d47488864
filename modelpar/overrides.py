"""The words of a command line: Hydra's overrides, checked; wrong ones are errors in one line."""

import os
import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from modelpar.declare import flatten, walk
from modelpar.errors import SettingsError, one_line, refuse_choice
from modelpar.files import local_path
from modelpar.schemas import SCHEMAS

REMOVED: Final = {  # earlier settings, and what to do instead
    "comm.check": "set TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment",
}
PLAIN: Final = re.compile(r"/[A-Za-z0-9_./-]*")  # a path that needs no quotes
FOLDER: Final = re.compile(r"\+*(run_dir|hydra\.(run|sweep)\.dir)=")  # of the output
HEADER: Final = re.compile(r"\s*(#\s*@.*\s+)*#\s*@package\s")  # before all other lines
ELEMENT: Final = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]+)""")  # of a list
# The options of Hydra's groups, and the extra of this package that installs each.
PLUGINS: Final = {
    "hydra/launcher": {
        "basic": "",
        "joblib": "joblib",
        "submitit_local": "slurm",
        "submitit_slurm": "slurm",
    },
    "hydra/sweeper": {"basic": "", "optuna": "optuna"},
}


def conf_dir() -> Path:
    """Return the folder of the yaml files: in the wheel, or next to the package in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def parsed(main: str, words: Sequence[str]) -> list[Override]:
    """Return the overrides of a command line; raises SettingsError for unknown keys and groups."""
    loader = GlobalHydra.instance().config_loader()
    overrides = [_override(main, word) for word in words]
    keys = {override.key_or_group for override in overrides}
    for key in keys & {"hydra.run.dir", "hydra.sweep.dir"}:
        if "run_dir" in keys:
            raise SettingsError(f"run_dir, {key}: both name the output folder; use run_dir alone")
    own = [override for override in overrides if override.key_or_group == "hydra.searchpath"]
    folders = [folder for override in own for folder in _search_path(override)]
    search: Any = {"config_name": main, "overrides": [str(one.input_line) for one in own]}
    for override in overrides:
        key = override.key_or_group
        if options := loader.get_group_options(key, **search if own else {}):
            for option in values_of(override):
                name = option.partition("=")[2]
                _check_option(key, name, options)
                for path in filter(Path.is_file, (one / key / f"{name}.yaml" for one in folders)):
                    _check_file(main, key, path)
        elif not override.is_hydra_override():
            _check_key(main, key)
            if override.is_delete():
                raise SettingsError(f"{override.input_line}: use {key}=VALUE")
    return overrides


def _override(main: str, word: str) -> Override:
    """Return a word of a command line as Hydra reads it; raises SettingsError."""
    key, equals, text = word.partition("=")
    if word.startswith("-"):
        raise SettingsError(f"use key=value, --cfg job or --help, not {word}")
    if not key:
        raise SettingsError(f"{word}: not a setting and its value; use KEY=VALUE")
    try:
        loader = GlobalHydra.instance().config_loader()
        (override,) = OverridesParser.create(loader).parse_overrides([word])
    except HydraException:
        fix = quote_it(main, key, text) if equals else "use KEY=VALUE"
        raise SettingsError(f"{word}: not a setting and its value; {fix}") from None
    if key in path_keys(main) and not override.is_sweep_override():
        value = override.value()
        as_text = value is None or isinstance(value, str) or str(value) == text
        if not (as_text or (isinstance(value, list) and path_keys(main)[key])):
            raise SettingsError(f"{word}: not read as a path; {quote_it(main, key, text)}")
    return override


def _groups(main: str) -> set[str]:
    """Return the keys of a command that hold other settings."""
    return {key.rpartition(".")[0] for key in flatten(SCHEMAS[main]())}


@cache
def path_keys(main: str) -> dict[str, bool]:
    """Return the settings of a command that are paths, and whether each may be a list."""
    entries = ((key, entry) for key, entry, _ in walk(SCHEMAS[main]()))
    return {
        key: "list" in str(entry.type) or entry.type is Any
        for key, entry in entries
        if "path" in entry.metadata
    }


def values_of(override: Override) -> list[str]:
    """Return the override once for each of its values; an interval has two, its ends."""
    key, value = override.get_key_element(), override.value()
    if override.is_discrete_sweep():
        values = [f"{key}={each}" for each in override.sweep_string_iterator()]
    elif isinstance(value, IntervalSweep):
        values = [f"{key}={value.start}", f"{key}={value.end}"]
    else:
        values = [str(override.input_line)]
    if not values:
        raise SettingsError(f"{override.input_line}: matches nothing; use other values")
    return values


def _check_option(group: str, name: str, options: Sequence[str]) -> None:
    """Raise SettingsError if ``name`` is not one of the group's options."""
    if name in options:
        return
    plugins = PLUGINS.get(group, {})
    if extra := plugins.get(name):
        raise SettingsError(f"{group}={name}: not installed; pip install 'modelpar[{extra}]'")
    refuse_choice(group, name, plugins or sorted(options))


def _check_key(main: str, key: str) -> None:
    """Raise SettingsError, with the nearest key, if ``main`` has no setting ``key``."""
    known, given = list(flatten(SCHEMAS[main]())), key
    if key in known or key in _groups(main):
        return
    if replacement := REMOVED.get(key):
        raise SettingsError(f"{key}: was removed; {replacement}")
    key = key.lower()
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = get_close_matches(key, known, n=1) or [
        by_last[name] for name in get_close_matches(key.rpartition(".")[2], by_last, n=1)
    ]
    hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
    raise SettingsError(f"{given}: no such setting; {hint}")


# -- quotes ---------------------------------------------------------------------------------------


def quoted(key: str, value: object) -> str:
    """Return ``KEY="VALUE"``, which Hydra reads as this text, whatever characters it has."""
    return f"{key}={_in_quotes(str(value))}"


def shell_word(key: str, text: str) -> str:
    """Return ``KEY=VALUE`` with the quotes that Hydra and the shell need to read this text."""
    if PLAIN.fullmatch(text):
        return f"{key}={text}"
    return shlex.quote(f"{key}={_in_quotes(text)}")


def _in_quotes(text: str) -> str:
    escaped = re.sub(
        r"(\\*)(\"|$)", lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text
    )
    return f'"{escaped}"'


def quote_it(main: str, key: str, text: str) -> str:
    """Return the advice to quote a value, or each element of a list."""
    if text != " ".join(text.split()):  # the line of an error would not show it as it is
        return f"quote it, '{key}=\"VALUE\"'"
    lists = path_keys(main)
    found = [each.strip() for each in ELEMENT.findall(text[1:-1]) if each.strip()]
    elements = [_here(each) if key in lists else each for each in found]
    if elements and text[0] + text[-1] == "[]" and lists.get(key, True):
        shown = ",".join(each if each[0] in "\"'" else _in_quotes(each) for each in elements)
        return f"quote it, {shlex.quote(f'{key}=[{shown}]')}"
    return f"quote it, {shell_word(key, _here(text) if key in lists else text)}"


def _here(path: str) -> str:
    """Return ``path``, with ``./`` before a ``~`` that begins no home folder."""
    return f"./{path}" if os.path.expanduser(path).startswith("~") else path  # noqa: PTH111


# -- a search path of the user's own --------------------------------------------------------------


def with_search_path(words: Sequence[str]) -> list[str]:
    """Return ``words`` with ``--config-dir FOLDER`` as Hydra's setting ``hydra.searchpath``.

    As a setting it reaches the ranks and the jobs of a sweep.  Raises SettingsError.
    """
    rest: list[str] = []
    each = iter(words)
    for word in each:
        flag, equals, folder = word.partition("=")
        if flag in {"-cd", "--config-dir"}:
            folder = local_path(flag, folder if equals else next(each, ""))
            word = f"hydra.searchpath=[{_in_quotes(f'file://{folder}')}]"  # noqa: PLW2901
        rest.append(word)
    return rest


def _search_path(override: Override) -> list[Path]:
    """Return the folders of a search path.

    Raises SettingsError if one is missing, or has a file that Hydra would not use.
    """
    value, folders = override.value(), list[Path]()
    for place in value if isinstance(value, list) else []:
        folder = Path(str(place).removeprefix("file://"))
        if str(place).startswith("pkg://"):
            continue
        if not folder.is_dir():
            wrong = "is not a folder" if folder.exists() else "no such folder"
            raise SettingsError(f"{folder}: {wrong}; use one with files such as those of conf/")
        folders.append(folder)
        for path in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")):
            ours = conf_dir() / path.relative_to(folder)
            if ours.exists() and not ours.samefile(path):
                raise SettingsError(f"{path}: modelpar has a file of this name; rename it")
    return folders


def _check_file(main: str, group: str, path: Path) -> None:
    """Raise SettingsError for a file that cannot be read, or whose settings would go nowhere.

    Hydra's errors would not name it.  Raises YAMLError, which does.
    """
    try:
        text = path.read_text("utf-8")
        OmegaConf.load(path)
    except (OSError, ValueError) as error:
        fix = "use a readable file of settings in UTF-8"
        raise SettingsError(f"{path}: cannot be read ({one_line(error)}); {fix}") from None
    packaged = group.startswith("hydra/") or group in _groups(main)
    if not (packaged or HEADER.match(text)):
        fix = "add '# @package _global_' as its first line"
        raise SettingsError(f"{path}: sets {group} alone; {fix}")
