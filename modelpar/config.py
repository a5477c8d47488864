"""How settings are read: Hydra composes them from ``conf/``; errors are one line."""

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from modelpar.errors import SettingsError, one_line, refuse_choice
from modelpar.settings import SCHEMAS, check, flatten

REMOVED: Final = {  # earlier settings, and what to do instead
    "comm.check": "set TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment",
}
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


@cache
def load_group(group: str, name: str) -> dict[str, Any]:
    """Return ``conf/GROUP/NAME.yaml`` as plain values; raises SettingsError if there is none."""
    folder = conf_dir() / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        refuse_choice(group, name, names)
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml")))


# -- reading --------------------------------------------------------------------------------------


def read(main: str, words: Sequence[str]) -> Any:
    """Return the typed and checked settings of ``main`` for a command line; see ``read_run``."""
    return read_run(main, words)[0]


def read_run(main: str, words: Sequence[str]) -> tuple[Any, Path | None]:
    """Return the settings of the command ``main``, and the directory of a run that starts now.

    The directory is None for a command without runs.  Raises SettingsError.
    """
    composed = compose_settings(main, words)
    run_dir = Path(str(composed.hydra.run.dir)) if "run_dir" in composed else None
    return typed(composed), run_dir


def compose_settings(main: str, words: Sequence[str]) -> DictConfig:
    """Return ``conf/MAIN.yaml`` with the overrides ``words`` and Hydra's own settings.

    Raises SettingsError for unknown keys and groups, values of another type, and sweeps.
    """
    with _hydra_started():
        for override in _parsed(main, words):
            if override.is_sweep_override():
                raise SettingsError(
                    f"{override.input_line}: several values; add -m to sweep over them"
                )
        composed = compose(main, list(words), return_hydra_config=True)
    if search := composed.hydra.runtime.choices.get("search"):
        raise SettingsError(
            f"search={search}: is a sweep; run python -m modelpar.{main} -m search={search}"
        )
    return composed


def typed(composed: DictConfig) -> Any:
    """Return composed settings as the dataclass of their command, resolved and checked.

    Raises SettingsError for a value that is missing or not allowed.
    """
    with _one_line_errors():
        own = composed.copy()
        with open_dict(own):
            own.pop("hydra", None)
        for key in sorted(OmegaConf.missing_keys(own)):
            raise SettingsError(f"{key}: missing; add {key}=...")
        settings = OmegaConf.to_object(own)
    check(settings)
    return settings


def check_sweep(main: str, words: Sequence[str]) -> tuple[list[Any], DictConfig, set[str]]:
    """Return the settings of jobs of a sweep, Hydra's own settings, and the keys that vary.

    The jobs have each value once, together with the first values of the other keys.  Raises
    SettingsError for the first value that is not allowed.
    """
    with _hydra_started():
        overrides = _parsed(main, words)
        firsts = [_values(each)[0] for each in overrides]
        hydra = compose(main, firsts, return_hydra_config=True).hydra
        params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
        overrides = [*_parsed(main, params), *overrides]
        for override in overrides:
            if override.is_interval_sweep() and hydra.runtime.choices["hydra/sweeper"] == "basic":
                raise SettingsError(f"{override.input_line}: requires hydra/sweeper=optuna")
        lists = [_values(each) for each in overrides]
        varied = {values[0].partition("=")[0] for values in lists if len(values) > 1}
        if "run_dir" in varied:
            raise SettingsError("run_dir: several values; use one, each job has a folder in it")
        firsts = [values[0] for values in lists]
        jobs = [typed(compose(main, firsts))]
        for place, values in enumerate(lists):
            for value in values[1:]:
                words = [*firsts[:place], value, *firsts[place + 1 :]]
                jobs.append(typed(compose(main, words)))
    return jobs, hydra, varied


def run_hydra(main: str, task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra read the command line and call ``task`` for each job; raises SettingsError."""
    _register()
    with _one_line_errors():
        hydra.main(config_path=str(conf_dir()), config_name=main, version_base="1.3")(task)()


# -- overrides ------------------------------------------------------------------------------------


def _parsed(main: str, words: Sequence[str]) -> list[Override]:
    """Return the overrides of a command line; raises SettingsError for unknown keys and groups."""
    loader = GlobalHydra.instance().config_loader()
    overrides: list[Override] = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise SettingsError(f"use key=value, --cfg job or --help, not {word}")
        try:
            (override,) = OverridesParser.create(loader).parse_overrides([word])
        except HydraException:
            fix = f"quote it, '{key}=\"{value}\"'" if equals else "use KEY=VALUE"
            raise SettingsError(f"{word}: not a setting and its value; {fix}") from None
        key = override.key_or_group
        if options := loader.get_group_options(key):
            for option in _values(override):
                _check_option(key, option.partition("=")[2], options)
        elif not override.is_hydra_override():
            _check_key(main, key)
            if override.is_delete():
                raise SettingsError(f"{word}: use {key}=VALUE")
        overrides.append(override)
    return overrides


def _values(override: Override) -> list[str]:
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
    known = list(flatten(SCHEMAS[main]()))
    groups = {name.rpartition(".")[0] for name in known}
    if key in known or key in groups:
        return
    if replacement := REMOVED.get(key):
        raise SettingsError(f"{key}: was removed; {replacement}")
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = get_close_matches(key, known, n=1) or [
        by_last[name] for name in get_close_matches(key.rpartition(".")[2], by_last, n=1)
    ]
    hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
    raise SettingsError(f"{key}: no such setting; {hint}")


# -- Hydra ----------------------------------------------------------------------------------------


def _register() -> None:
    """Register the schemas with Hydra, under the names in the defaults lists of the yaml files."""
    OmegaConf.register_new_resolver(  # ${given_or:VALUE,DEFAULT}
        "given_or", lambda value, default: default if value is None else value, replace=True
    )
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        node = OmegaConf.structured(schema)
        for key, value in flatten(schema()).items():
            if isinstance(value, dict):  # whose keys are not settings
                OmegaConf.set_struct(OmegaConf.select(node, key), value=False)
        store.store(name=f"{name}_schema", node=node)


@contextmanager
def _hydra_started() -> Generator[None]:
    """Let Hydra compose ``conf/`` with the schemas; raises SettingsError for its errors."""
    GlobalHydra.instance().clear()
    _register()
    place = str(conf_dir())
    with initialize_config_dir(version_base="1.3", config_dir=place), _one_line_errors():
        yield


@contextmanager
def _one_line_errors() -> Generator[None]:
    """Turn an error of Hydra or OmegaConf into SettingsError, one line with key and cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        key, text = getattr(cause, "full_key", None) or "", one_line(cause)
        if "is not a ListConfig" in text:
            text = "use a list, [VALUE,VALUE]"
        text = re.split(r" full_key:| To append to your config| object_type=| See http", text)[0]
        raise SettingsError(f"{key}: {text}" if key and key not in text else text) from None


# -- what settings stand for ----------------------------------------------------------------------


def cache_dir(setting: str | None) -> Path:
    """Return the folder of statistics: the setting, or modelpar's folder in the XDG cache."""
    if setting is not None:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "modelpar"


SECRET: Final = re.compile(
    r"SECRET|TOKEN|PASSW|_PWD|CREDENTIAL|KEY$|PRIVATE|DATABASE_UR[IL]", re.IGNORECASE
)
SHORT: Final = 6  # characters; shorter values occur in too many texts


def without_secrets(settings: Any) -> Any:
    """Return the settings as they may be written to disk.

    The value of an environment variable whose name marks it as secret is replaced by an
    interpolation of the variable, ``${oc.env:NAME}``.
    """
    if isinstance(settings, dict):
        return {key: without_secrets(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [without_secrets(value) for value in settings]
    if not isinstance(settings, str):
        return settings
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SHORT and value in settings:
            settings = settings.replace(value, f"${{oc.env:{name}}}")
    return settings


def quoted(key: str, value: object) -> str:
    """Return ``KEY='VALUE'``, which Hydra reads as this text, whatever characters it has."""
    text = re.sub(r"(\\+)(?='|$)", lambda found: found[1] * 2, str(value)).replace("'", r"\'")
    return f"{key}='{text}'"
