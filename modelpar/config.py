"""How settings are read: composed by Hydra from ``conf/``, typed, validated."""

import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
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
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modelpar.errors import SettingsError, one_line
from modelpar.settings import (
    CONTENDERS,
    DEVICES,
    HOSTS,
    ON_FAILURE,
    PRECISIONS,
    SCHEMAS,
    VIEWS,
    WIRE_DTYPES,
    BenchmarkSettings,
    CommSettings,
    CompareSettings,
    CrossingSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FiguresSettings,
    LinkSettings,
    ModelSettings,
    MonitorSettings,
    RecipeSettings,
    TrainSettings,
    refuse_choice,
)


def conf_dir() -> Path:
    """Return the folder of the yaml files: inside the wheel, or beside the package in a tree."""
    package = Path(__file__).resolve().parent
    for place in (package / "conf", package.parent / "conf"):
        if place.is_dir():
            return place
    raise SettingsError(f"no conf/ in {package} or beside it: install modelpar again")


@cache
def load_group(group: str, name: str) -> dict[str, Any]:
    """Return ``conf/GROUP/NAME.yaml`` as plain values; raises SettingsError where it is not."""
    folder = conf_dir() / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        refuse_choice(group, name, names)
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml")))


def register() -> None:
    """Make the schemas known to Hydra, under the names the yaml files' defaults lists use."""
    OmegaConf.register_new_resolver("given_or", _given_or, replace=True)
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def _given_or(value: object, default: object) -> object:
    """Resolve ``${given_or:VALUE,DEFAULT}``: the default where the value is null."""
    return default if value is None else value


@contextmanager
def _hydra_started() -> Generator[None]:
    started = GlobalHydra.instance()
    if started.is_initialized():
        started.clear()
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        yield


def compose_settings(main: str, overrides: Sequence[str]) -> DictConfig:
    """Return ``conf/MAIN.yaml`` with ``overrides`` and Hydra's own node, not yet validated.

    Raises SettingsError, in one line and with the nearest key, for what Hydra refuses.
    """
    for word in overrides:  # an optional group would take a name that is not there for none
        group, _, name = word.partition("=")
        if (conf_dir() / group).is_dir() and group.isidentifier():
            load_group(group, name)
    try:
        with _hydra_started():
            settings = compose(main, overrides=list(overrides), return_hydra_config=True)
            for key in settings:
                if key != "hydra":
                    OmegaConf.to_container(OmegaConf.masked_copy(settings, str(key)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explain(main, error)) from None
    return settings


def check_sweep(main: str, overrides: Sequence[str]) -> tuple[DictConfig, frozenset[str]]:
    """Return the composed settings of a sweep's first job, and the keys that have one value.

    Each value of each list is tried beside the first ones of the other lists, those of the sweeper
    too.  Raises SettingsError, in one line, for what Hydra refuses.
    """
    lists = _lists(main, overrides)
    if any(len(values) > 1 and values[0].startswith("run_dir=") for values in lists):
        raise SettingsError(
            "run_dir: several values; a sweep has one, and a folder in it for each job"
        )
    first = compose_settings(main, [values[0] for values in lists])
    to_object(main, first)
    own = first.hydra.sweeper.get("params") or {}
    lists = [*_lists(main, [f"{key}={value}" for key, value in own.items()]), *lists]
    words = [values[0] for values in lists]
    for place, values in enumerate(lists):
        for value in values[1:]:
            to_object(main, compose_settings(main, [*words[:place], value, *words[place + 1 :]]))
    keys = [(values[0].partition("=")[0], len(values) > 1) for values in lists]
    swept = {key for key, several in keys if several}
    return first, frozenset(key for key, _ in keys if key not in swept)


def _lists(main: str, overrides: Sequence[str]) -> list[list[str]]:
    """Return for each override what it stands for: itself, or one for each value of its list."""
    lists: list[list[str]] = []
    try:
        with _hydra_started():
            loader = GlobalHydra.instance().config_loader()
            for override in OverridesParser.create(loader).parse_overrides(list(overrides)):
                key, value = override.get_key_element(), override.value()
                if override.is_discrete_sweep():
                    values = [f"{key}={each}" for each in override.sweep_string_iterator()]
                elif isinstance(value, IntervalSweep):
                    values = [f"{key}={value.start}", f"{key}={value.end}"]
                else:
                    values = [str(override.input_line)]
                if not values:
                    raise SettingsError(f"{override.input_line}: stands for nothing; give values")
                lists.append(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explain(main, error)) from None
    return lists


def run_hydra(main: str, task: Callable[[DictConfig], Any]) -> None:
    """Hand over to Hydra, which reads the command line and calls ``task`` for each job."""
    register()
    hydra.main(config_path=str(conf_dir()), config_name=main, version_base="1.3")(task)()


# What Hydra takes for its own groups, and the extra of ours that brings it.
PLUGINS: Final = {
    "hydra/launcher": {
        "basic": "",
        "joblib": "joblib",
        "submitit_local": "slurm",
        "submitit_slurm": "slurm",
    },
    "hydra/sweeper": {"basic": "", "optuna": "optuna"},
}


def explain(main: str, error: Exception) -> str:
    """Fold what Hydra says of ``main`` into one line: what, where, how to mend it."""
    cause = error.__cause__ or error
    text = one_line(cause)
    key = getattr(cause, "full_key", None) or getattr(error, "override", None) or ""
    if unquoted := re.search(r"LexerNoViableAltException: ([^=]*)=(.*?)\s*\^", text):
        name, value = unquoted.groups()
        return f"{name}={value}: has a character that must be quoted; give '{name}=\"{value}\"'"
    if missing := re.search(r"Could not find '(hydra/\w+)/([^']*)'", text):
        group, name = missing.groups()
        extra = PLUGINS.get(group, {}).get(name)
        if not extra:
            refuse_choice(group, name, PLUGINS.get(group, {}))
        return f"{group}={name}: not installed; pip install 'modelpar[{extra}]'"
    if missing := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, name = missing.groups()
        refuse_choice(
            group, name, sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        )
    if "is not in struct" in text or re.search(r"Key '[^']*' not in '", text):
        known = list(_keys(SCHEMAS[main]))
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = get_close_matches(key, known, n=1) or [
            by_last[name] for name in get_close_matches(key.rpartition(".")[2], by_last, n=1)
        ]
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
        return f"{key}: no such setting; {hint}"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{ambiguous[1]}: several values; add -m to sweep over them"
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}: not given; add {missing[1]}=..."
    if "is not a ListConfig" in text:
        text = "give a list, in brackets"
    for noise in (" full_key:", " To append to your config", " object_type=", " See https://"):
        text = text.partition(noise)[0]
    return f"{key}: {text}" if key and key not in text else text


def _keys(schema: type[Any], prefix: str = "") -> Iterable[str]:
    for name, entry in schema.__dataclass_fields__.items():
        yield prefix + name
        nested = {
            "data": DataSettings,
            "recipe": RecipeSettings,
            "model": ModelSettings,
            "crossing": CrossingSettings,
            "comm": CommSettings,
            "monitor": MonitorSettings,
            "link": LinkSettings,
        }.get(entry.name if not prefix else "")
        if nested:
            yield from _keys(nested, f"{name}.")


def to_object(main: str, settings: DictConfig) -> Any:
    """Return the typed settings of ``main``, all values resolved and present.

    Raises SettingsError for a value of another type or one that is missing.
    """
    try:
        plain = OmegaConf.to_container(
            OmegaConf.create({key: settings[key] for key in settings if key != "hydra"}),
            resolve=True,
            throw_on_missing=True,
        )
        merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS[main]), plain)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SettingsError(explain(main, error)) from None


def validate_train(settings: TrainSettings) -> None:
    """Raise SettingsError for the first value of ``settings`` that no run can have."""
    _validate_common(settings)
    _at_least(
        1,
        epochs=settings.epochs,
        steps=settings.steps,
        log_every=settings.log_every,
        **{"data.evaluate_every": settings.data.evaluate_every},
    )
    _at_least(0, seed=settings.seed, restarts=settings.restarts)
    _at_least(0, checkpoint_every=settings.checkpoint_every, keep_every=settings.keep_every)
    _at_least(1, **{"data.epochs": settings.data.epochs})
    _at_least(0, **{"data.checkpoint_every": settings.data.checkpoint_every})
    _at_least(2, keep_last=settings.keep_last)
    if settings.views not in VIEWS:
        refuse_choice("views", settings.views, VIEWS)


def validate_evaluate(settings: EvaluateSettings) -> None:
    """Raise SettingsError for the first value of ``settings`` that no evaluation can have."""
    _validate_common(settings)
    if settings.views not in VIEWS:
        refuse_choice("views", settings.views, VIEWS)


def validate_export(settings: ExportSettings) -> None:
    """Raise SettingsError where the exported file cannot be written."""
    out = Path(settings.out)
    if out.suffix != ".safetensors":
        raise SettingsError(f"out={out}: give a name that ends in .safetensors")
    _check_writable("out", out.parent)


def validate_compare(settings: CompareSettings) -> None:
    """Raise SettingsError where there is nothing to compare, or nowhere to write."""
    if not settings.runs:
        raise SettingsError("runs=[]: give run directories, sweeps of them, or globs")
    _check_writable("out", Path(settings.out))


def validate_figures(settings: FiguresSettings) -> None:
    """Raise SettingsError where there is nothing to look at, or nowhere to draw."""
    if settings.checkpoint is None and not settings.runs:
        raise SettingsError("checkpoint: not given; add checkpoint=RUN_DIR, or runs=[RUN,RUN]")
    _at_least(1, training_images=settings.training_images, batch_size=settings.batch_size)
    _at_least(0, workers=settings.workers, **{"data.workers": settings.data.workers})
    if settings.device not in DEVICES:
        refuse_choice("device", settings.device, DEVICES)
    _check_writable("out", Path(settings.out))


def validate_benchmark(settings: BenchmarkSettings) -> None:
    """Raise SettingsError for the first value of ``settings`` that no benchmark can have."""
    _validate_process(settings)
    _at_least(1, rounds=settings.rounds, steps=settings.steps)
    for key, values, choices in (
        ("contenders", settings.contenders, CONTENDERS),
        ("precisions", settings.precisions, PRECISIONS),
    ):
        if not values:
            raise SettingsError(f"{key}=[]: give one or more of {', '.join(choices)}")
        for value in values:
            if value not in choices:
                refuse_choice(key, value, choices)
    if not settings.batch_sizes:
        raise SettingsError("batch_sizes=[]: give one or more")
    for size in settings.batch_sizes:
        _at_least(1, batch_sizes=size)
        if size % 2 and "ddp" in settings.contenders:
            raise SettingsError(f"batch_sizes={size}: ddp halves a batch; give even numbers")
    _validate_link(settings.link)
    _check_writable("out", Path(settings.out))


def _validate_link(link: LinkSettings) -> None:
    if link.hosts and len(link.hosts) != HOSTS:
        raise SettingsError(f"link.hosts={link.hosts}: give one for each of two processes")
    if link.rates and not link.hosts:
        raise SettingsError("link.rates: needs two hosts; start with launch/slow_link.sh")
    for rate in link.rates:
        if not (math.isfinite(rate) and rate > 0):
            raise SettingsError(f"link.rates={rate}: give a finite number of Mbit/s over 0")


def _validate_common(settings: TrainSettings | EvaluateSettings) -> None:
    _at_least(
        1, columns=settings.columns, replicas=settings.replicas, batch_size=settings.batch_size
    )
    _at_least(0, workers=settings.workers, **{"data.workers": settings.data.workers})
    check_on_failure(settings.on_failure)
    if settings.columns not in {1, 2}:
        refuse_choice("columns", settings.columns, (1, 2))
    if settings.precision not in PRECISIONS:
        refuse_choice("precision", settings.precision, PRECISIONS)
    _validate_process(settings)
    check_crossing(settings)


def check_crossing(settings: TrainSettings | EvaluateSettings) -> None:
    """Raise SettingsError where maps shall travel as another dtype, and none travels."""
    if settings.columns == 1 and settings.crossing.dtype not in {None, settings.precision}:
        raise SettingsError(
            f"crossing.dtype={settings.crossing.dtype}: in one process nothing crosses; give "
            "columns=2, or crossing.dtype=null"
        )


def check_on_failure(value: str) -> None:
    """Raise SettingsError where ``value`` does not say what a sweep does when a job fails."""
    if value not in ON_FAILURE:
        refuse_choice("on_failure", value, ON_FAILURE)


def _validate_process(settings: TrainSettings | EvaluateSettings | BenchmarkSettings) -> None:
    _at_least(1, threads=settings.threads, **{"crossing.chunks": settings.crossing.chunks})
    if settings.device not in DEVICES:
        refuse_choice("device", settings.device, DEVICES)
    if settings.crossing.dtype is not None and settings.crossing.dtype not in WIRE_DTYPES:
        refuse_choice("crossing.dtype", settings.crossing.dtype, WIRE_DTYPES)
    if not (math.isfinite(settings.comm.timeout) and settings.comm.timeout > 0):
        raise SettingsError(
            f"comm.timeout={settings.comm.timeout}: give a finite number of seconds over 0"
        )


def _at_least(least: int, **values: int | None) -> None:
    for key, value in values.items():
        if value is not None and value < least:
            raise SettingsError(f"{key}={value}: give {least} or more")


def _check_writable(key: str, folder: Path) -> None:
    existing = folder.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:
        raise SettingsError(f"{key}={folder}: {error.strerror}; give another folder") from None
    if not existing.is_dir():
        raise SettingsError(f"{key}={folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise SettingsError(f"{key}={folder}: {existing} cannot be written; give another folder")


def check_run_dir(folder: Path) -> None:
    """Raise SettingsError where ``folder`` cannot become a run directory."""
    _check_writable("run_dir", folder)


def cache_dir(setting: str | None) -> Path:
    """Return where statistics are kept: the setting, or modelpar's folder in the XDG cache."""
    if setting is not None:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "modelpar"


SECRET: Final = re.compile(
    r"SECRET|TOKEN|PASSW|_PWD|CREDENTIAL|KEY$|PRIVATE|DATABASE_UR[IL]", re.IGNORECASE
)
SHORT: Final = 6  # characters: below, a value is found in too many texts


def without_secrets(settings: Any) -> Any:
    """Return the settings as they may lie on a disk.

    Where a text holds the value of an environment variable that is secret by its name, it names
    the variable instead, as it stood in the command or could have.
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


Validator = Callable[[Any], None]
VALIDATORS: Final[dict[str, Validator]] = {
    "train": validate_train,
    "evaluate": validate_evaluate,
    "benchmark": validate_benchmark,
    "export": validate_export,
    "compare": validate_compare,
    "figures": validate_figures,
}


def typed(main: str, settings: DictConfig) -> Any:
    """Return the typed and checked settings of ``main``; raises SettingsError in one line."""
    plain = to_object(main, settings)
    VALIDATORS[main](plain)
    return plain


def read(main: str, overrides: Sequence[str]) -> Any:
    """Compose, type and check the settings of ``main``; raises SettingsError in one line."""
    composed = compose_settings(main, overrides)
    settings = typed(main, composed)
    if search := composed.hydra.runtime.choices.get("search"):
        raise SettingsError(
            f"search={search}: is a sweep; run python -m modelpar.{main} -m search={search}"
        )
    return settings


def new_run_dir(main: str, overrides: Sequence[str]) -> Path:
    """Return the output directory of a run of ``main`` that starts now."""
    return Path(str(compose_settings(main, overrides).hydra.run.dir))


def has_flags(words: Sequence[str]) -> bool:
    """Whether the command line has flags, which are Hydra's: ``--help``, ``--cfg``, ``-m``."""
    return any(word.startswith("-") for word in words)
