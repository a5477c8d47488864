"""Paths on a command line: expanded, absolute, checked; quotes; folders of one's own settings."""

import os
import shlex
import sys
from pathlib import Path

import pytest

import modelpar
from modelpar import command, config, overrides, sweep
from modelpar.declare import walk
from modelpar.errors import SettingsError
from modelpar.files import local_path
from modelpar.schemas import SCHEMAS

# A command line that each command accepts, but for its paths.
WORDS = {
    "train": [],
    "evaluate": ["checkpoint=x"],
    "benchmark": [],
    "export": ["checkpoint=x", "out=x.safetensors"],
    "convert": ["source=x", "out=x.safetensors"],
    "compare": ["runs=[x]"],
    "figures": ["checkpoint=x"],
    "prepare": ["out=x"],
    "predict": ["checkpoint=x", "images=x"],
}

# Of the file that out names.
ENDS = {
    "evaluate": ".json",
    "export": ".safetensors",
    "convert": ".safetensors",
    "predict": ".csv",
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("modelpar.checks.check_writable", lambda *_: None)


def refused(main: str, *words: str) -> str:
    with pytest.raises(SettingsError) as error:
        config.read_run(main, list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_setting_that_looks_like_a_path_is_declared_as_one() -> None:
    names = ("root", "dir", "out", "checkpoint", "runs", "resume", "folder", "file", "path")
    for main, schema in SCHEMAS.items():
        for key, _, _ in walk(schema()):
            if key.rpartition(".")[2].rpartition("_")[2] in names:
                assert key in overrides.path_keys(main), key


@pytest.mark.parametrize("main", WORDS)
def test_every_path_is_expanded_absolute_and_checked(main: str, tmp_path: Path) -> None:
    def words(name: str, *keys: str) -> list[str]:
        forms = {key: '["{}"]' if paths[key] else '"{}"' for key in keys}
        return [
            f"{key}={form.format(name + (ENDS.get(main, '') if key == 'out' else ''))}"
            for key, form in forms.items()
        ]

    def read(name: str) -> set[str]:
        found = {key: value for key, _, value in walk(config.read(main, words(name, *paths)))}
        texts = [one for key in paths for one in ([*found[key]] if paths[key] else [found[key]])]
        return {text.removesuffix(ENDS.get(main, "")) for text in texts}

    paths = overrides.path_keys(main)
    assert read("~/a") == {"/home/me/a"}
    assert read("/b/c") == {"/b/c"}
    assert read("a") <= {f"{tmp_path}/a", "a"}  # globs of runs stay as they are
    for key in paths:
        given = [word for word in WORDS[main] if not word.startswith(f"{key}=")]
        said = f"{key}=s3://a"
        assert refused(main, *given, *words("s3://a", key)).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "key: empty, as from an unset variable; use a path, or leave key out"),
        (" ", "key: empty"),
        ("s3://bucket/a", "key=s3://bucket/a: is an address; use a path of this machine"),
        ("s3:/bucket/a", "is an address"),
        ("file:///a", "is an address"),
        ("~nobody-here/a", "no such home folder; use an absolute path, or ./~nobody-here/a"),
    ],
)
def test_what_is_no_path_is_one_line(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        local_path("key", text)
    assert said in str(error.value)


def test_an_unset_variable_is_refused() -> None:
    assert refused("train", "data.root=").startswith("data.root: empty")
    assert refused("train", "run_dir=").startswith("run_dir: empty")
    assert refused("train", "hydra.run.dir=").startswith("hydra.run.dir: empty")
    assert refused("train", "run_dir=").endswith("; use a path, or leave run_dir out")
    assert refused("export", "checkpoint=", "out=x.onnx").endswith("; use a path")  # required


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run_dir=a"], "a"),
        (['run_dir="~/a"'], "/home/me/a"),
        (['run_dir="./~a"'], "~a"),
        (['hydra.run.dir="~/a"'], "/home/me/a"),
        (["run_dir=a", "hydra.job.chdir=true"], "a"),
    ],
)
def test_the_directory_of_a_run(tmp_path: Path, words: list[str], expected: str) -> None:
    assert config.read_run("train", words)[1] == tmp_path / expected


def test_one_output_folder_is_enough() -> None:
    assert "use run_dir alone" in refused("train", "run_dir=a", "hydra.run.dir=b")
    with pytest.raises(SettingsError, match=r"run_dir, hydra\.sweep\.dir: both name the output"):
        config.check_sweep("train", ["run_dir=a", "hydra.sweep.dir=b"])
    assert "run_dir=s3://b: is an address" in refused("train", "run_dir=s3://b")


def test_a_sweep_stays_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the relative paths of its jobs would name other files."""
    seen: list[tuple[Path, list[str]]] = []

    def job(_: object, words: list[str]) -> int:
        seen.append((Path.cwd(), words))
        return 0

    monkeypatch.setattr(sweep.Sweep, "_run", job)
    monkeypatch.setattr(sweep, "_handle_signals", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["modelpar-train"])
    before = Path.cwd()
    assert sweep.run("train", ["-m", "run_dir=s", "seed=1", "hydra.job.chdir=true"]) == 0
    ((place, words),) = seen
    assert place == before
    assert f'run_dir="{before}/s/0"' in words


# -- quotes ---------------------------------------------------------------------------------------

NAMES = ["a=b", "a,b", "a(b)", "a{b}", "[x]", "{x}", "it's", 'say "x"', "~/x", "choice(a,b)"]
NAMES += [
    "1e3",
    "1_000",
    "true",
    "x y",
    "a:b",
    "100%",
    "d\u00eda",
    "a#b",
    "a;b",
    "(x)",
    "a]",
    "\\",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_read_as_it_is_or_after_the_advice(name: str) -> None:
    try:
        found = config.read("train", [f"data.root={name}"]).data.root
        assert found == f"{Path.cwd()}/{name}"
    except SettingsError as error:
        _, advice = str(error).split("quote it, ")
        (word,) = shlex.split(advice)  # as the shell reads it
        with config.hydra_started():
            (override,) = overrides.parsed("train", [word])
        assert override.value() == name


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("[~/x]", ["~/x"]),
        ("[~/x, ~/e.json]", ["~/x", "~/e.json"]),
        ("[a=b ,c, ]", ["a=b", "c"]),
        ("a,b", ["a", "b"]),
        ("[runs/i,]", ["runs/i"]),
        ("""["a, b",'c',~x]""", ["a, b", "c", "./~x"]),
        ("~x", "./~x"),  # no user of this name
    ],
)
def test_the_advice_names_what_was_meant(text: str, read: object) -> None:
    _, advice = refused("export", f"checkpoint={text}", "out=x.onnx").split("quote it, ")
    with config.hydra_started():
        (override,) = overrides.parsed("export", shlex.split(advice))
    assert override.value() == read


@pytest.mark.parametrize("text", ["a  b(", "a\nb(", " [~/x]"])
def test_the_advice_never_names_another_path(text: str) -> None:
    with pytest.raises(SettingsError) as error:
        config.read("train", [f"data.root={text}"])
    assert str(error.value).endswith("""; quote it, 'data.root="VALUE"'""")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    said = f"cache_dir={tmp_path}/{name}: {tmp_path}/file is a file; use a folder"
    assert refused("train", f"cache_dir={name}") == said


# -- a folder of one's own settings ---------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    place = tmp_path / "my settings" / "experiment"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text("# @package _global_\nexperiment: mine\nseed: 7\n")
    return place.parent


@pytest.mark.parametrize("form", [["-cd", "FOLDER"], ["--config-dir=FOLDER"]])
def test_an_experiment_of_ones_own_is_found(own: Path, form: list[str]) -> None:
    words = overrides.with_search_path([word.replace("FOLDER", own.name) for word in form])
    settings = config.read("train", [*words, "experiment=mine"])
    assert (settings.experiment, settings.seed) == ("mine", 7)
    assert "experiment=mime: did you mean mine?" in refused("train", *words, "experiment=mime")
    assert "did you mean batch_size?" in refused("train", *words, "batchsize=4")
    jobs, *_ = config.check_sweep("train", [*words, "experiment=mine,no_lrn"])
    assert [job.seed for job in jobs] == [7, 0]


def test_a_folder_that_cannot_be_used_is_named(own: Path) -> None:
    missing = overrides.with_search_path(["-cd", "nowhere"])
    assert f"{own.parent}/nowhere: no such folder" in refused("train", *missing)
    (own / "experiment" / "no_lrn.yaml").touch()
    words = overrides.with_search_path(["-cd", str(own)])
    assert "no_lrn.yaml: modelpar has a file of this name" in refused("train", *words)
    file = overrides.with_search_path(["-cd", str(own / "experiment" / "mine.yaml")])
    assert "mine.yaml: is not a folder; use one" in refused("train", *file)
    with pytest.raises(SettingsError, match="-cd: empty"):
        overrides.with_search_path(["-cd"])


HEAD = b"# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [\n", "mine.yaml, line 2: expected the node content"),
        (HEAD + b"seed:\n\t- 1\n", "mine.yaml, line 3: found character"),
        (HEAD + b"seed: 1\nseed: 2\n", "mine.yaml, line 3: found duplicate key seed; correct"),
        (HEAD + b"seed: \0\n", 'mine.yaml", position 26'),
        (HEAD + b"experiment: \xff\n", "mine.yaml: cannot be read ('utf-8' codec can't decode"),
        (HEAD + b"defaults:\n  - mine\n", "files of settings name each other without end; corre"),
        (HEAD + b"defaults: 3\n", "defaults must be a list"),
        (b"seed: 1\n", "mine.yaml: sets experiment alone; add '# @package _global_' as its first"),
        (b"# Mine\n" + HEAD + b"seed: 1\n", "mine.yaml: sets experiment alone"),
        (b"", "mine.yaml: sets experiment alone"),
        (b"- 1\n", "mine.yaml: sets experiment alone"),
        (None, "mine.yaml: cannot be read ("),
    ],
)
def test_a_damaged_file_of_ones_own_is_one_line(
    own: Path, content: bytes | None, said: str
) -> None:
    file = own / "experiment" / "mine.yaml"
    file.unlink()
    if content is None:
        file.symlink_to("/proc/self/mem")  # cannot be read, even by root
    else:
        file.write_bytes(content)
    words = overrides.with_search_path(["-cd", str(own), "experiment=mine"])
    assert said in refused("train", *words)


def shown(*words: str, capfd: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Return exit status, stdout and stderr of ``modelpar-train``."""
    sys.argv = ["modelpar-train", *words]
    with pytest.raises(SystemExit) as end:
        command.main("train", "nothing:needed", "nothing:needed")
    return end.value.code, *capfd.readouterr()


def test_settings_are_shown_with_the_errors_of_a_run(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = shown("--cfg", "job", "-cd", str(own), "experiment=mine", capfd=capfd)
    assert code == 0
    assert "seed: 7\n" in out
    for words, said in (
        (["--cfg", "job", "batchsize=4"], "batchsize: no such setting; did you mean batch_size?"),
        (["--cfg", "job", "-cd", str(own), "batchsize=4"], "did you mean batch_size?"),
        (["--cfg", "job", "-cd", "nowhere"], "nowhere: no such folder"),
        (["--cfg", "job", "batch_size=many"], "batch_size=many: use a whole number"),
    ):
        code, out, line = shown(*words, capfd=capfd)
        assert (code, out, line.count("\n")) == (2, "", 1), line
        assert said in line


def test_the_version_is_ours(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["-m", "--version"]):
        assert shown(*words, capfd=capfd) == (0, f"modelpar {modelpar.__version__}\n", "")


def test_a_job_of_a_sweep_finds_the_folder_again(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sweep.Sweep, "_run", lambda _, words: seen.append(words) or 0)
    monkeypatch.setattr(sweep, "_handle_signals", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["modelpar-train"])
    words = overrides.with_search_path(["-m", "-cd", str(own), "run_dir=s", "experiment=mine"])
    assert sweep.run("train", words) == 0
    assert config.read("train", seen[0]).seed == 7
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
