"""Settings: what is accepted, and the one line each wrong one gets."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

from modelpar import Recipe, config, launch
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, SettingsError
from modelpar.files import check_writable
from modelpar.net import paper
from modelpar.settings import TrainSettings
from modelpar.training import prepare
from modelpar.training import run_dir as run_dirs


def refused(overrides: list[str]) -> str:
    with pytest.raises(SettingsError) as error:
        prepare.prepare(config.read("train", overrides))
    line = str(error.value)
    assert "\n" not in line
    assert error.value.status == 2
    return line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batchsize=4", "batchsize: no such setting; did you mean batch_size?"),
        ("BATCH_SIZE=4", "BATCH_SIZE: no such setting; did you mean batch_size?"),
        ("=4", "=4: not a setting and its value; use KEY=VALUE"),
        ("lr=0.1", "lr: no such setting; did you mean recipe.lr?"),
        ("data.rot=x", "did you mean data.root?"),
        ("+new=1", "new: no such setting"),
        ("recipe.lr=abc", "recipe.lr=abc: use a number"),
        ("recipe.lr=", "recipe.lr"),
        ("recipe.lr=nan", "recipe.lr=nan: use a finite number"),
        ("recipe.lr=1e999", "recipe.lr=inf: use a finite number"),
        ("recipe.lr=-1", "recipe.lr=-1.0"),
        ("recipe.momentum=inf", "recipe.momentum=inf"),
        ("recipe=code2013", "recipe=code2013: did you mean code2012?"),
        ("recipe.crops=per_64", "recipe.crops=per_64: did you mean per_32?"),
        ("data=photo", "data=photo: did you mean photos?"),
        ("batch_size=0", "batch_size=0: use 1 or more"),
        ("batch_size=1.5", "batch_size=1.5: use a whole number"),
        ("steps=abc", "steps=abc: use a whole number"),
        ("compile=maybe", "compile=maybe: use true or false"),
        ("batch_size=5000", "the data has only 2240"),
        ("epochs=-3", "epochs=-3"),
        ("steps=0", "steps=0"),
        ("columns=3", "columns=3: use one of 1, 2"),
        ("replicas=0", "replicas=0"),
        ("seed=-1", "seed=-1"),
        ("seed=1,2", "add -m to sweep"),
        ("precision=float16", "precision=float16: did you mean bfloat16?"),
        ("device=gpu", "device=gpu"),
        ("cuda_graph=yes", "cuda_graph=yes: use one of auto, on, off"),
        ("crossing.dtype=int8", "crossing.dtype=int8"),
        ("comm.timeout=0", "comm.timeout=0"),
        ("comm.timeout=inf", "comm.timeout=inf"),
        ("comm.timeout=1e10", "comm.timeout=10000000000.0: use a number below 1000000000.0"),
        ("keep_last=1", "keep_last=1"),
        ("data.workers=-1", "data.workers=-1"),
        ("data.epochs=0", "data.epochs=0"),
        ("data.checkpoint_every=-1", "data.checkpoint_every=-1"),
        ("checkpoint_every=-1", "checkpoint_every=-1"),
        ("model.num_classes=15", "data=photos: has 14 classes, not 15; use model.num_classes=14"),
        ("model.image_size=32", "model.image_size=32"),
        ("model.image_size=97", "stored at 96 pixels"),
        ("model.dropout=1", "model.dropout=1"),
        ("model.norm=batchnorm", "model.norm=batchnorm"),
        ("model.crossing_at=[conv7]", "model.crossing_at=conv7"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("batch_size", "batch_size"),
    ],
)
def test_a_wrong_setting_is_one_line(override: str, expected: str) -> None:
    assert expected in refused([override])


def test_defaults_are_the_contract() -> None:
    settings = config.read("train", [])
    plain = asdict(settings)
    assert plain["data"]["name"] == "photos"
    assert plain["recipe"]["name"] == "code2012"
    for key, value in {
        "columns": 2,
        "replicas": 1,
        "batch_size": 128,
        "seed": 0,
        "precision": "float32",
        "device": "auto",
        "share_gpu": False,
        "compile": True,
        "cuda_graph": "auto",
        "channels_last": True,
        "threads": None,
        "tf32": False,
        "deterministic": False,
        "run_dir": None,
        "resume": "auto",
        "keep_last": 2,
        "log_every": 1,
        "restarts": 0,
    }.items():
        assert plain[key] == value
    assert plain["crossing"] == {"dtype": None, "overlap": True, "chunks": None}
    assert plain["comm"] == {"timeout": 120.0}
    assert config.read("train", ["cuda_graph=off"]).cuda_graph == "off"  # false in YAML


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "checkpoint: missing; add checkpoint=..."),
        (["checkpoint=x", "views=5"], "views=5: use one of 1, 9, 10"),
        (["checkpoint=x", "data=imagenete"], "data=imagenete: did you mean imagenet"),
        (["checkpoint=x", "batch_size=0"], "batch_size=0"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_evaluate_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as error:
        config.read("evaluate", words)
    assert expected in str(error.value)


def test_only_commands_with_sweeps_advise_one() -> None:
    for main, fix in (("evaluate", "add -m to sweep over them"), ("export", "use one")):
        with pytest.raises(SettingsError, match=f"ema=true,false: several values; {fix}$"):
            config.read(main, ["ema=true,false"])


def test_evaluate_takes_a_root_alone() -> None:
    settings = config.read("evaluate", ["checkpoint=x", "data.root=/elsewhere"])
    assert (settings.data.name, settings.data.root) == ("", "/elsewhere")


@pytest.mark.parametrize("name", ["paper", "code2012", "clean"])
def test_each_recipe_composes_and_is_named(name: str) -> None:
    settings = config.read("train", [f"recipe={name}"])
    assert Recipe(**asdict(settings.recipe)) == Recipe.named(name)


def test_the_recipes_differ_where_paper_and_code_do() -> None:
    text, code = asdict(Recipe.named("paper")), asdict(Recipe.named("code2012"))
    differing = {key for key in text if text[key] != code[key]}
    assert differing == {
        "name",
        "weight_std",
        "norm_alpha",
        "norm1_input",
        "norms",
        "rates",
        "schedule",
        "decay",
        "colour_noise",
        "crops",
        "shuffle",
    }
    clean = asdict(Recipe.named("clean"))
    assert {key for key in clean if clean[key] != code[key]} == {"name", "schedule"}
    assert paper.RATE == text["lr"] == code["lr"]


@pytest.mark.parametrize("name", ["photos", "synthetic", "fashion_mnist", "cifar10", "imagenette"])
def test_each_data_set_composes(name: str) -> None:
    assert config.read("train", [f"data={name}"]).data.name == name


def test_value_on_the_command_line_overrides_the_data_group() -> None:
    settings = config.read("train", ["data=imagenet", "data.epochs=3", "workers=0"])
    assert settings.data.epochs == 3
    assert settings.workers == 0


# -- a run directory that is used already ---------------------------------------------------------


def begun(run_dir: Path, *overrides: str) -> Any:
    settings = config.read("train", list(overrides))
    run_dir.mkdir(exist_ok=True)
    run_dirs.write_config(run_dir, settings, Mesh(torch.device("cpu")))
    return settings


def test_run_may_continue_with_more_epochs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    begun(run_dir, "seed=1")
    run_dirs.check_compatible(run_dir, config.read("train", ["seed=1", "epochs=9"]))
    assert OmegaConf.load(run_dir / "config.yaml").seed == 1


def test_run_may_continue_without_a_variable_that_its_incidental_settings_named(
    tmp_path: Path,
) -> None:
    begun(run_dir := tmp_path / "run", "seed=1")
    recorded = OmegaConf.load(run_dir / "config.yaml")
    recorded.cache_dir = "${oc.env:A_SECRET_THAT_IS_GONE}"
    OmegaConf.save(recorded, run_dir / "config.yaml")
    run_dirs.check_compatible(run_dir, config.read("train", ["seed=1"]))
    with pytest.raises(SettingsError, match="seed=1, not 2"):
        run_dirs.check_compatible(run_dir, config.read("train", ["seed=2"]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=2", "seed=1, not 2"),
        ("recipe=paper", "recipe.name=code2012, not paper"),
        ("recipe.lr=0.1", "recipe.lr=0.01, not 0.1"),
        ("batch_size=64", "128 images per step"),
        ("model.norm=none", "model.norm=null, not none"),
        ("data=synthetic", "data.name=photos, not synthetic"),
    ],
)
def test_another_run_is_refused_by_the_first_difference(
    tmp_path: Path, override: str, named: str
) -> None:
    begun(tmp_path / "run", "seed=1")
    settings = config.read("train", ["seed=1", override])
    with pytest.raises(SettingsError, match=named):
        run_dirs.check_compatible(tmp_path / "run", settings)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="thesis"):
        run_dirs.check_compatible(tmp_path, TrainSettings())


def test_resume_never_refuses_a_used_folder(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(SettingsError, match="resume=never"):
        run_dirs.check_compatible(tmp_path / "run", TrainSettings(resume="never"))


def test_a_run_dir_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file"):
        check_writable("run_dir", tmp_path / "file" / "run")


def test_run_directory_is_locked_by_one_run(tmp_path: Path) -> None:
    alone = Mesh(torch.device("cpu"), timeout=0.4)
    with run_dirs.locked(tmp_path / "run", alone):
        with (
            pytest.raises(CheckpointError, match="in use by another run"),
            run_dirs.locked(tmp_path / "run", alone),
        ):
            pytest.fail("two at once")
        run_dirs.write_config(tmp_path / "run", TrainSettings(seed=1), alone)
    with run_dirs.locked(tmp_path / "run", alone):
        assert OmegaConf.load(tmp_path / "run" / "config.yaml").seed == 1


def test_change_of_the_trajectory_is_reported(tmp_path: Path) -> None:
    settings = begun(tmp_path / "run", "epochs=3")
    assert run_dirs.trajectory_changes(tmp_path / "run", settings) == []
    longer = config.read("train", ["epochs=4", "log_every=7"])
    assert run_dirs.trajectory_changes(tmp_path / "run", longer) == ["epochs=4, not 3"]


def test_lock_of_a_killed_run_is_waited_for(tmp_path: Path) -> None:
    alone = Mesh(torch.device("cpu"))
    (tmp_path / "run" / "log").mkdir(parents=True)
    held = FileLock(tmp_path / "run" / run_dirs.LOCK, thread_local=False)
    held.acquire()
    threading.Timer(0.5, held.release).start()
    with run_dirs.locked(tmp_path / "run", alone):
        assert not held.is_locked


@pytest.mark.parametrize("name", ["STORE_ACCESS_KEY", "MYSQL_PWD", "DATABASE_URL", "SIGNING_KEY"])
def test_secrets_of_the_environment_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "tellnobody")
    settings = config.read("train", [f"data.root=/mnt/${{oc.env:{name}}}/images"])
    assert "tellnobody" in settings.data.root
    run_dirs.write_config(tmp_path, settings, Mesh(torch.device("cpu")))
    text = (tmp_path / "config.yaml").read_text()
    assert "tellnobody" not in text
    assert f"root: /mnt/${{oc.env:{name}}}/images" in text
    run_dirs.check_compatible(tmp_path, settings)  # and the run can continue


def test_crossing_dtype_needs_two_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="one column has no crossings; use columns=2"):
        config.read("train", ["columns=1", "crossing.dtype=float16"])
    config.read("train", ["columns=1", "crossing.dtype=float32"])  # as it is anyway
    config.read("train", ["crossing.dtype=float16"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="one column has no crossings"):  # it uses the GPU
        launch.run_launcher("train", lambda *_: None, ["crossing.dtype=float16"])
