"""README and docs agree with the code: links, files, settings, values, defaults, commands."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING, ListConfig, OmegaConf
from pages import PAGES, ROOT, code, commands, links, program, spans, tables

from modelpar import config, errors
from modelpar.net.plan import Plan
from modelpar.settings import SCHEMAS, flatten, walk

DOCS = ROOT / "docs"
IDS = [page.name for page in PAGES]
TOP = ("modelpar/", "conf/", "docs/", "launch/", "tests/", ".ci/", ".github/")
GROUPS = ("data", "recipe", "experiment", "search")
SETTINGS = {name: flatten(schema()) for name, schema in SCHEMAS.items()}
# A word of a command line that stands for any value: FOLDER, PATH, N, NAME.
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.|")


def known(main: str, key: str) -> bool:
    """Whether the command has this setting, group or part of its settings."""
    return any(name == key or name.startswith(f"{key}.") for name in SETTINGS[main]) or (
        main == "train" and key in GROUPS
    )


def test_readme_is_a_front_page() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9000


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_and_file_exists(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    named = [span for span in spans(page) if span.startswith(TOP) and "*" not in span]
    words = [word for line in commands(page) for word in line.split() if word.startswith(TOP)]
    missing += [path for path in [*named, *words] if not (ROOT / path.split()[0]).exists()]
    assert not missing


def test_every_page_is_reached_from_the_readme() -> None:
    assert {target for target in links(PAGES[0]) if target.startswith("docs/")} == {
        f"docs/{page.name}" for page in PAGES[1:]
    }


def settings_in(page: Path) -> list[list[str]]:
    """Return the words KEY=VALUE of each piece of inline code that has any."""
    found = [
        [word for word in shlex.split(span) if re.match(r"[a-z0-9_./]+=", word)]
        for span in spans(page)
        if "=" in span
    ]
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_setting_in_the_text_is_accepted(page: Path) -> None:
    for words in settings_in(page):
        pairs = [word.partition("=")[::2] for word in words if not word.startswith("hydra")]
        mains = [name for name in SCHEMAS if all(known(name, key) for key, _ in pairs)]
        assert mains, words
        given = [f"{key}={value}" for key, value in pairs if not PLACEHOLDER.fullmatch(value)]
        if mains[0] == "train" and given and "search=rate" not in given:
            config.read("train", given)


@pytest.mark.parametrize(
    "command", [line for page in PAGES for line in commands(page) if program(line)[0] in SCHEMAS]
)
def test_the_settings_of_every_command_are_accepted(command: str) -> None:
    main, words = program(command)
    if "search=rate" in words:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    flags = {word for word in words if word.startswith("-")}
    words = [word for word in words if word not in flags]
    if "-m" in flags:
        launcher = [word for word in words if not word.startswith("hydra")]
        config.check_sweep(main, launcher)
    elif not flags:
        config.read(main, words)


# -- the tables of settings ----------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return a value as a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple, ListConfig)):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def default(main: str, key: str) -> Any:
    """Return a setting's default; of a switch of the net that of ``Plan``."""
    value = SETTINGS[main][key]
    first, _, last = key.partition(".")
    plan = {entry.name: entry.default for entry in fields(Plan)}
    if value is None and first == "model" and last not in {"num_classes", "image_size"}:
        return plan[last]
    if value == MISSING:
        value = OmegaConf.select(config.compose_settings(main, []), key)
    return value


def choices(main: str, key: str) -> list[str]:
    """Return the values a setting may have, as text; an empty list if there is no such list."""
    entries = {name: entry for name, entry, _ in walk(SCHEMAS[main]())}
    found = entries[key].metadata.get("choices") if key in entries else None
    return [shown(value) for value in found or ()]


def rows_of(page: Path, main: str, sections: tuple[str, ...] = ()) -> list[list[str]]:
    """Return the rows of the tables of settings, of some sections of a page."""
    return [
        row
        for heading, head, rows in tables(page)
        if head[0] == "setting" and (not sections or heading in sections)
        for row in rows
        if main
    ]


TRAIN = ("What is trained", "How it is computed", "What is kept and shown")
PLACES = [
    ("train", "settings.md", TRAIN),
    ("evaluate", "settings.md", ("Evaluate",)),
    ("export", "settings.md", ("Export",)),
    ("convert", "weights.md", ("Convert",)),
    ("prepare", "settings.md", ("Prepare",)),
    ("compare", "experiments.md", ("Compare runs",)),
    ("figures", "figures.md", ()),
    ("benchmark", "benchmarks.md", ()),
]


@pytest.mark.parametrize(("main", "name", "sections"), PLACES)
def test_tables_of_settings_agree_with_the_schema(
    main: str, name: str, sections: tuple[str, ...]
) -> None:
    for key, values, first, _ in rows_of(DOCS / name, main, sections):
        (setting,) = code(key)
        assert known(main, setting), setting
        if listed := choices(main, setting):
            assert sorted(code(values)) == sorted(listed), setting
        written = code(first)
        expected = default(main, setting) if setting in SETTINGS[main] else None
        by_group = first.startswith("by ") or first == "required"
        if written and not by_group and "XDG" not in first and first != "as `precision`":
            assert written == [shown(expected)], setting
        else:
            everything = code(values) if first == "all" else None
            assert by_group or expected in (None, [], everything), setting


def test_the_table_of_training_settings_is_complete() -> None:
    listed = [code(row[0])[0] for row in rows_of(DOCS / "settings.md", "train", TRAIN)]
    assert len(listed) == len(set(listed))
    wanted = {key for key in SETTINGS["train"] if not key.startswith("published.")}
    assert set(listed) == wanted | {"published"}


@pytest.mark.parametrize(("main", "name", "sections"), PLACES[1:])
def test_every_setting_of_the_other_commands_is_named(
    main: str, name: str, sections: tuple[str, ...]
) -> None:
    del sections
    text = (DOCS / name).read_text()
    if main in {"evaluate", "export", "prepare"}:  # one section of the page
        text = text.partition(f"## {main.capitalize()}\n")[2].partition("\n## ")[0]
    keys = [key if key.startswith("link.") else key.partition(".")[0] for key in SETTINGS[main]]
    assert not [key for key in keys if f"`{key}`" not in text]


def test_the_readme_has_ten_settings_with_their_defaults() -> None:
    (rows,) = [rows for _, head, rows in tables(PAGES[0]) if head[0] == "setting"]
    assert len(rows) == 10
    for key, first, _ in rows:
        (setting,) = code(key)
        composed = config.compose_settings("train", [])
        value = composed.hydra.runtime.choices[setting] if setting in GROUPS else composed[setting]
        assert code(first) == ([] if value is None else [shown(value)]), setting


# -- tables of groups ----------------------------------------------------------------------------


def table(name: str, head: str) -> list[list[str]]:
    (rows,) = [rows for _, first, rows in tables(DOCS / name) if first[0] == head]
    return rows


def stems(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_the_table_of_data_sets_agrees_with_conf() -> None:
    rows = table("data.md", "`data=`")
    assert {code(row[0])[0] for row in rows} == stems("data")
    for name, _, crops, epochs, _ in rows:
        values = config.load_group("data", code(name)[0])
        length = str(values["epochs"] or "by recipe")
        assert (crops, epochs) == (str(values["image_size"]), length), name


def test_the_table_of_recipes_agrees_with_conf() -> None:
    rows = table("recipes.md", "`recipe.`")
    recipes = [config.load_group("recipe", name) for name in ("paper", "code2012", "clean")]
    assert {code(row[0])[0] for row in rows} == set(recipes[0]) - {"name"}
    for key, *cells in rows:
        (switch,) = code(key)
        paper, code2012, clean = cells
        for cell, values in zip((paper, code2012), recipes, strict=False):
            assert code(cell)[0] == values[switch], switch
        same = recipes[2][switch] == recipes[1][switch]
        assert (
            (not code(clean) or clean == "as `code2012`")
            if same
            else code(clean)[0] == recipes[2][switch]
        )


def test_the_table_of_experiments_agrees_with_conf() -> None:
    rows = table("experiments.md", "`experiment=`")
    assert {name for row in rows for name in code(row[0])} == stems("experiment")
    for names, _, published in rows:
        for name in code(names):
            values = config.load_group("experiment", name)["published"]
            if values["top1"] is not None and values["top5"] is not None:
                numbers = re.findall(r"\d+\.\d+", published)[:2]
                places = [len(number.partition(".")[2]) for number in numbers]
                exact = [values["top1"], values["top5"]]
                assert numbers == [
                    f"{value + 1e-9:.{count}f}" for value, count in zip(exact, places, strict=True)
                ], name
            if values["views"] == 1 and name != "one_view":
                assert "one view" in published


def test_the_table_of_exit_statuses_is_complete() -> None:
    statuses = {kind.status for kind in errors.RunError.__subclasses__()}
    assert {int(row[0]) for row in table("reliability.md", "status")} == statuses | {0, 1, 130}


def test_the_design_page_names_every_module() -> None:
    package = {
        f"../{path.relative_to(ROOT)}"
        for path in (ROOT / "modelpar").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(package - set(links(DOCS / "design.md"))) == []
