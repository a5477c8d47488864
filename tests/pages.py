"""README.md and docs/*.md as data: links, code, tables, shell commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from modelpar.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAINS = tuple(SCHEMAS)  # the commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the contents of the page's fenced code blocks of that language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page: continued lines joined, comments removed, && split."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [
        command.strip()
        for line in words
        if line
        for command in f" {shlex.join(line)} ".split(shlex.quote("&&"))
    ]


def program(command: str) -> tuple[str, list[str]]:
    """Return which of MAINS a command starts, or its first word, and that program's own words."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        name = word.removeprefix(".venv/bin/").replace("-", ".", 1).removeprefix("modelpar.")
        if name in MAINS and name != word:
            return name, words[place + 1 :]
    return words[0], words[1:]


def spans(page: Path) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that are not addresses in the web."""
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", page.read_text()))
    return [target for target in found if "://" not in target]


def tables(page: Path) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the heading, the head and the rows of each table of a page."""
    heading, table = "", []
    for line in [*FENCE.sub("", page.read_text()).splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            yield heading, table[0], table[2:]
            table = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def code(cell: str) -> list[str]:
    """Return the inline code of a table's cell."""
    return re.findall(r"`([^`]+)`", cell)
