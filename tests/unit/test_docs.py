"""README and docs agree with the code: links, files, settings, values, defaults, commands."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from pages import PAGES, ROOT, code, commands, links, program, spans, tables

from modelpar import config, errors
from modelpar.declare import default_text, flatten, values_text, walk
from modelpar.net.plan import Plan
from modelpar.schemas import SCHEMAS

DOCS = ROOT / "docs"
IDS = [page.name for page in PAGES]
TOP = ("modelpar/", "conf/", "docs/", "launch/", "tests/", ".ci/", ".github/")
GROUPS = ("data", "recipe", "experiment", "search", "debug")
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
        f"docs/{page.name}" for page in [*PAGES[1:], *DOCS.glob("*.ipynb")]
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


def without_links(cell: str) -> str:
    """Return a cell as a declaration has it: a link is its text, that of a page its path."""
    named = re.sub(r"\[([a-z]+\.md)\]\([^)]*\)", r"docs/\1", cell)
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", named)


def row_of(main: str, key: str) -> list[str]:
    """Return the row of a table for a setting, from its declaration."""
    settings = SCHEMAS[main]()
    found = {entry.name: (entry, None) for entry in fields(settings)}
    found |= {name: (entry, value) for name, entry, value in walk(settings)}
    entry, value = found[key]
    return [f"`{key}`", values_text(entry), default_text(entry, value), entry.metadata["means"]]


def rows_of(page: Path, sections: tuple[str, ...]) -> list[list[str]]:
    """Return the rows of the tables of settings, of some sections of a page."""
    return [
        row
        for heading, head, rows in tables(page)
        if head[0] == "setting" and (not sections or heading in sections)
        for row in rows
    ]


TRAIN = (
    "What is trained",
    "How it is computed",
    "What is kept and shown",
    "Debug",
)
PLACES = [
    ("train", "settings.md", TRAIN),
    ("evaluate", "settings.md", ("Evaluate",)),
    ("export", "settings.md", ("Export",)),
    ("predict", "settings.md", ("Predict",)),
    ("convert", "weights.md", ("Convert",)),
    ("prepare", "settings.md", ("Prepare",)),
    ("compare", "experiments.md", ("Compare runs",)),
    ("figures", "figures.md", ()),
    ("benchmark", "benchmarks.md", ()),
]


@pytest.mark.parametrize(("main", "name", "sections"), PLACES)
def test_tables_of_settings_agree_with_the_declarations(
    main: str, name: str, sections: tuple[str, ...]
) -> None:
    for row in rows_of(DOCS / name, sections):
        assert [without_links(cell) for cell in row] == row_of(main, code(row[0])[0])


def test_what_stands_for_a_default_agrees_with_the_net_and_the_groups() -> None:
    plan = {entry.name: entry.default for entry in fields(Plan)}
    composed = config.compose_settings("train", [])
    for key, entry, value in walk(SCHEMAS["train"]()):
        first, _, last = key.partition(".")
        unset = entry.metadata.get("unset", "")
        if first == "model" and code(unset):
            assert code(unset) == [str(plan[last])], key
        if unset == "by data" and first == "data":
            group = config.load_group("data", composed.hydra.runtime.choices.data)
            assert last in group or value is None, key
        if unset == "by recipe":
            assert last in config.load_group("recipe", "paper"), key


def test_the_table_of_training_settings_is_complete() -> None:
    listed = [code(row[0])[0] for row in rows_of(DOCS / "settings.md", TRAIN)]
    assert len(listed) == len(set(listed))
    wanted = {key for key in SETTINGS["train"] if not key.startswith("published.")}
    assert set(listed) == wanted | {"published"}


@pytest.mark.parametrize(("main", "name", "sections"), PLACES[1:])
def test_every_setting_of_the_other_commands_is_named(
    main: str, name: str, sections: tuple[str, ...]
) -> None:
    del sections
    text = (DOCS / name).read_text()
    if main in {"evaluate", "export", "prepare", "predict"}:  # one section of the page
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
        assert code(first) == ([] if value is None else [str(value)]), setting


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


def test_the_table_of_debug_agrees_with_conf() -> None:
    assert {code(row[0])[0] for row in table("settings.md", "`debug=`")} == stems("debug")


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


# -- the walk through the paper ------------------------------------------------------------------

PAPER = DOCS / "paper.md"
SECTIONS = (
    "1",
    "2",
    "3",
    "3.1",
    "3.2",
    "3.3",
    "3.4",
    "3.5",
    "4",
    "4.1",
    "4.2",
    "5",
    "6",
    "6.1",
    "7",
)


def sections() -> dict[str, str]:
    """Return the text of each section of the walk, by its number in the paper."""
    _, *parts = re.split(r"^#{2,3} ([\d.]+) .*\n", PAPER.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def defined(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yield the names that a module defines, and ``Class.name`` of what its classes define."""
    for entry in node.body:
        if isinstance(entry, ast.ClassDef):
            yield from (entry.name, *(f"{entry.name}.{name}" for name in defined(entry)))
        elif isinstance(entry, ast.FunctionDef):
            yield entry.name
        elif isinstance(entry, ast.Assign | ast.AnnAssign):
            targets = entry.targets if isinstance(entry, ast.Assign) else [entry.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_the_walk_has_every_section_of_the_paper() -> None:
    found = sections()
    assert tuple(found) == SECTIONS
    for number, text in found.items():
        heads = re.findall(r"^\*\*(The paper|The code|Here|Not here)\.\*\*", text, re.MULTILINE)
        within = any(other.startswith(f"{number}.") for other in SECTIONS)
        assert (not heads and within) or heads[:3] == ["The paper", "The code", "Here"], number


@pytest.mark.parametrize("number", SECTIONS)
def test_every_name_in_the_walk_is_defined_in_the_file_before_it(number: str) -> None:
    here = re.findall(
        r"^\*\*Here\.\*\*.*?(?=\n\n|\Z)", sections()[number], re.MULTILINE | re.DOTALL
    )
    names = set[str]()  # of the file that was linked last
    for target, name in re.findall(r"\[`[^`]+`\]\(([^)#]+)\)|`([^`]+)`", "".join(here)):
        if target.endswith(".py"):
            names = set(defined(ast.parse((DOCS / target).read_text())))
        elif name and "=" not in name:  # settings with a value are checked above
            assert name in names or known("train", name), name
