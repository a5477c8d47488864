"""How settings are read: Hydra composes them from ``conf/``; errors are one line."""

import io
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, reduce
from pathlib import Path
from typing import Any, Final, cast

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from modelpar.checks import check
from modelpar.declare import flatten, walk
from modelpar.errors import SettingsError, one_line, refuse_choice
from modelpar.files import local_path
from modelpar.overrides import conf_dir, parsed, path_keys, quote_it, values_of, with_search_path
from modelpar.schemas import SCHEMAS

NOT_CONVERTED: Final = re.compile(
    r"Value '(.*)' (?:of type '.*' could not be converted to (Integer|Float)"
    r"|is not a valid bool \(type .*\))"
)
KINDS: Final = {"Integer": "a whole number", "Float": "a number", None: "true or false"}


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
    with _one_line_errors():
        run_dir = folder_of(composed, "run") if "run_dir" in composed else None
    return typed(composed), run_dir


def folder_of(composed: DictConfig, mode: str) -> Path:
    """Return the absolute output folder of a ``run`` or a ``sweep``; raises SettingsError."""
    given = composed.get("run_dir") is not None
    key = "run_dir" if given else f"hydra.{mode}.dir"
    return local_path(key, str(composed.hydra[mode].dir))


def compose_settings(main: str, words: Sequence[str]) -> DictConfig:
    """Return ``conf/MAIN.yaml`` with the overrides ``words`` and Hydra's own settings.

    Raises SettingsError for unknown keys and groups, values of another type, and sweeps.
    """
    with hydra_started():
        for override in parsed(main, words):
            if override.is_sweep_override():
                fixes = ["add -m to sweep over them"] * hasattr(SCHEMAS[main], "on_failure")
                if (key := override.key_or_group) in path_keys(main):
                    text = str(override.input_line).partition("=")[2]
                    if path_keys(main)[key] and getattr(override.value(), "simple_form", False):
                        text = f"[{text}]"  # it can have several
                    fixes.append(quote_it(main, key, text))
                fix = ", or ".join(fixes) or "use one"
                raise SettingsError(f"{override.input_line}: several values; {fix}")
        composed = compose(main, list(words), return_hydra_config=True)
    if search := composed.hydra.runtime.choices.get("search"):
        raise SettingsError(
            f"search={search}: is a sweep; run python -m modelpar.{main} -m search={search}"
        )
    return composed


def typed(composed: DictConfig) -> Any:
    """Return composed settings as the dataclass of their command, resolved and checked.

    Paths are made absolute, see ``files.local_path``.  Two kinds stay as they were given, since
    tables show them: those of a list, which may be globs, and those declared ``as_given``.  Raises
    SettingsError for a value that is missing or not allowed.
    """
    with _one_line_errors():
        own = composed.copy()
        with open_dict(own):
            own.pop("hydra", None)
        for key in sorted(OmegaConf.missing_keys(own)):
            raise SettingsError(f"{key}: missing; add {key}=...")
        settings = OmegaConf.to_object(own)
    for key, entry, value in list(walk(settings)):
        if value is None and entry.default == MISSING:
            raise SettingsError(f"{key}=null: missing; add {key}=...")
        if value is None or value in entry.metadata.get("path", (value,)):
            continue
        *groups, name = key.split(".")
        owner = reduce(getattr, groups, settings)
        several = isinstance(value, list)
        texts = [str(each) for each in (cast("list[Any]", value) if several else [value])]
        required = entry.default == MISSING
        paths = [str(local_path(key, text, required=required)) for text in texts]
        if several or "as_given" in entry.metadata:
            pairs = zip(texts, paths, strict=True)
            paths = [path if text[0] == "~" else text for text, path in pairs]
        setattr(owner, name, paths if several else paths[0])
    check(settings)
    return settings


def check_sweep(main: str, words: Sequence[str]) -> tuple[list[Any], DictConfig, Path, set[str]]:
    """Return the settings of a sweep's jobs, Hydra's own, its folder, and the keys that vary.

    The jobs have each value once, together with the first values of the other keys.  Raises
    SettingsError for the first value that is not allowed.
    """
    with hydra_started():
        overrides = parsed(main, words)
        firsts = [values_of(each)[0] for each in overrides]
        composed = compose(main, firsts, return_hydra_config=True)
        hydra, folder = composed.hydra, folder_of(composed, "sweep")
        params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
        overrides = [*parsed(main, params), *overrides]
        for override in overrides:
            if override.is_interval_sweep() and hydra.runtime.choices["hydra/sweeper"] == "basic":
                raise SettingsError(f"{override.input_line}: requires hydra/sweeper=optuna")
        lists = [values_of(each) for each in overrides]
        varied = {values[0].partition("=")[0] for values in lists if len(values) > 1}
        if varied & {"run_dir", "hydra.sweep.dir"}:
            raise SettingsError("run_dir: several values; use one, each job has a folder in it")
        firsts = [values[0] for values in lists]
        jobs = [typed(compose(main, firsts))]
        for place, values in enumerate(lists):
            for value in values[1:]:
                words = [*firsts[:place], value, *firsts[place + 1 :]]
                jobs.append(typed(compose(main, words)))
    return jobs, hydra, folder, varied


def run_hydra(main: str, task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra read the command line and call ``task`` for each job; raises SettingsError."""
    _register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own message and exits
    with _one_line_errors():
        hydra.main(config_path=str(conf_dir()), config_name=main, version_base="1.3")(task)()


def show(main: str) -> None:
    """Let Hydra answer ``--cfg``, ``--info`` and ``--hydra-help``; raises SettingsError."""
    words = sys.argv[1:] = with_search_path(sys.argv[1:])
    with hydra_started():
        parsed(main, [word for word in words if "=" in word and not word.startswith("-")])
    complete(main)


def complete(main: str) -> None:
    """Let Hydra answer an option, such as that for completing words in a shell.

    Raises SettingsError where Hydra would print a reason and exit.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said), _one_line_errors(ValueError, RecursionError):
            run_hydra(main, lambda _: None)
    except SystemExit as end:
        if end.code:
            line = said.getvalue().rstrip().rpartition("\n")[2]
            raise SettingsError(line.rpartition(" error: ")[2]) from None
    sys.stderr.write(said.getvalue())


# -- Hydra ----------------------------------------------------------------------------------------


@cache
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
def hydra_started() -> Generator[None]:
    """Let Hydra compose ``conf/`` with the schemas; raises SettingsError for its errors."""
    GlobalHydra.instance().clear()
    _register()
    place = str(conf_dir())
    with (
        initialize_config_dir(version_base="1.3", config_dir=place),
        _one_line_errors(ValueError, RecursionError),  # of files of the user's own
    ):
        yield


@contextmanager
def _one_line_errors(*others: type[Exception]) -> Generator[None]:
    """Turn an error of Hydra, OmegaConf or YAML, or one of ``others``, into SettingsError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, *others) as error:
        raise SettingsError(_line(error.__cause__ or error)) from None


def _line(error: BaseException) -> str:
    """Return an error of the settings as one line with key or file, and cause."""
    if isinstance(error, RecursionError):
        return "the files of settings name each other without end; correct their defaults lists"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem}; correct this file"
    key, text = getattr(error, "full_key", None) or "", one_line(error)
    if "is not a ListConfig" in text:
        text = "use a list, [VALUE,VALUE]"
    text = re.split(r" full_key:| To append to your config| object_type=| See http", text)[0]
    if key and (found := NOT_CONVERTED.fullmatch(text)):
        return f"{key}={found[1]}: use {KINDS[found[2]]}"
    return f"{key}: {text}" if key and key not in text else text


# -- what settings stand for ----------------------------------------------------------------------


def cache_dir(setting: str | None) -> Path:
    """Return the cache folder: the setting, or modelpar's folder in the XDG cache."""
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
