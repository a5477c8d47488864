"""``--help`` has every setting, fits the terminal and needs no torch; the Tab key completes."""

import re
import shlex
import subprocess
import sys

import pytest
from pages import program

from modelpar import command, config, help  # noqa: A004
from modelpar.overrides import conf_dir
from modelpar.schemas import SCHEMAS

STARTS = """
import sys
from modelpar.train import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
"""


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Return the exit status of ``modelpar-train``."""
    monkeypatch.setattr(sys, "argv", ["modelpar-train", *words])
    with pytest.raises(SystemExit) as end:
        command.main("train", "nothing:needed", "nothing:needed")
    return end.value.code


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_has_every_setting_and_every_choice(name: str) -> None:
    keys = re.findall(r"^  ([a-z][a-z0-9_.]*)(?:  |$)", help.page(name, 100), re.MULTILINE)
    assert len(keys) == len(set(keys))
    settings = vars(SCHEMAS[name]())
    for key, value in settings.items():
        own = [f"{key}.{inner}" for inner in vars(value)] if hasattr(value, "__dict__") else [key]
        if key != "data" or name == "train":
            assert not set(own) - set(keys), key
    text = " ".join(help.page(name, 100).split())
    for group in ("data", "recipe", "experiment", "search", "debug") if name == "train" else ():
        names = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
        assert f"[{names}" in text
    assert ("-m, --multirun" in text) == ("on_failure" in settings)


def test_help_has_meanings_and_defaults() -> None:
    text = " ".join(help.page("train", 80).split())
    assert "replica (section 5 of the paper) [images; default: 128] " in text
    assert "precision bfloat16 keeps float32 weights in the optimizer [float32, bfloat16, " in text
    assert "run_dir one run per folder; without it each start is a new run in outputs/" in text
    assert "[folder; default: Hydra's output directory]" in text
    assert "published.top1 top-1 error [%; default: none]" in text
    prepared = " ".join(help.page("prepare", 80).split())
    assert "data the images [imagenet, imagefolder, imagenette; required]" in prepared
    assert "data.epochs" not in prepared


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", SCHEMAS)
def test_help_fits_the_terminal(name: str, width: int) -> None:
    lines = help.page(name, width).splitlines()
    long = [line for line in lines if len(line) > min(width, help.WIDEST)]
    assert not [line for line in long if " " in line.strip()]  # one word of an example
    assert max(map(len, lines)) > 0.9 * min(width, help.WIDEST)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_examples_of_help_are_commands(name: str) -> None:
    text = help.page(name, 40).replace("\\\n", " ")
    examples = [line for line in text.splitlines() if re.match("  (modelpar-|torchrun )", line)]
    assert examples
    for line in examples:
        main, words = program(shlex.join(shlex.split(line)))
        assert main == name
        if "-m" in words:
            config.check_sweep(main, [word for word in words if word != "-m"])
        else:
            config.read(main, words)


def test_help_needs_no_torch() -> None:
    start = [sys.executable, "-c", STARTS, "--help", "batch_size=8"]
    done = subprocess.run(start, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: modelpar-train [KEY=VALUE]...\n")


def test_a_rank_shows_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert status(monkeypatch, "--help") == 1  # what it would run does not exist


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cfg x", "argument --cfg/-c: invalid choice: 'x'"),
        ("--cfg data=synthetic", "argument --cfg/-c: invalid choice"),
        ("--cfg", "argument --cfg/-c: expected one argument"),
        ("--info x", "argument --info/-i: invalid choice: 'x'"),
        ("-m --cfg job", "Only one of --run, --multirun, --cfg"),
        ("--cfg job --package nosuch", "package 'nosuch' not found in config"),
        ("-sc install=foo", "No completion plugin for 'foo' found"),
        ("-sc", "Expecting one subcommand from ['install'"),
    ],
)
def test_a_wrong_option_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    assert status(monkeypatch, *words.split()) == 2
    out, line = capfd.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith(f"modelpar: {said}")


def test_the_tab_key_completes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, words in (
        ("modelpar-train recipe=c", "recipe=caffe recipe=clean recipe=code2012"),
        ("modelpar-train batch_s", "batch_size="),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        assert status(monkeypatch, "--shell-completion", "query=bash") == 0
        assert capfd.readouterr() == (f"{words}\n", "")
    assert status(monkeypatch, "-sc", "install=bash") == 0
    assert "complete -o nospace -o default -F hydra_bash_completion" in capfd.readouterr().out
