"""Predictions of files agree with evaluations, in one process, on the pair, and in Python."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks
from PIL import Image
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_averaging import untrained
from tqdm.utils import disp_len

from modelpar import AlexNet, Column, Link, config, predict
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.images.augment import Augmentation
from modelpar.interchange.exports import export
from modelpar.studies import predictions
from modelpar.training import evaluation, prediction, prepare, runner
from modelpar.training.checkpoint import HASH, Checkpoint
from modelpar.training.exported import STATISTICS
from modelpar.training.prediction import Answer, Prediction
from modelpar.training.trained import find

ALONE = Mesh(torch.device("cpu"))
HOW = ["workers=0", "batch_size=16"]


@pytest.fixture(scope="module")
def place(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, and its export with other weights of fc8, which tell images apart."""
    folder = tmp_path_factory.mktemp("predict")
    words = ["data=imagefolder", f"data.root={images}", "model.image_size=64", "columns=1"]
    words += ["batch_size=8", "workers=0", "steps=1", "compile=false"]
    words += ["monitor.progress=false", "monitor.tensorboard=false"]
    settings = config.read("train", words)
    runner.train(settings, prepare.prepare(settings), ALONE, folder / "run")
    file = folder / "net.safetensors"
    export(config.read("export", [f"checkpoint={folder / 'run'}", f"out={file}"]))
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    del about[HASH]  # of the weights that are changed here
    state = load_file(file)
    source = torch.Generator().manual_seed(0)
    state["fc8.weight"] = torch.randn(2, 4096, generator=source)
    save_file(state, file, about)
    (seen,) = evaluation.prepare(config.read("evaluate", [f"checkpoint={file}", "columns=1"]))
    augmentation = Augmentation(seen.statistics, 64, scaled=False, device="cpu")
    stored = torch.stack([seen.images.test[row][0] for row in range(10)])
    with torch.no_grad():
        logits = AlexNet.load(file)(augmentation.center_crop(stored))
    state["fc8.bias"] = torch.stack([(logits[:, 1] - logits[:, 0]).median(), torch.zeros(())])
    save_file(state, file, about)
    return folder


def answers(mesh: Mesh, words: list[str]) -> tuple[list[Answer], list[str]]:
    settings = config.read("predict", [*HOW, *words])
    return prediction.predict_files(settings, prediction.prepare(settings), mesh)


def shares(found: list[Answer]) -> list[Any]:
    return [share for one in found for share in one.prediction.probabilities]


@pytest.mark.parametrize("views", [1, 10])
def test_files_have_the_errors_that_an_evaluation_counts(
    place: Path, images: Path, views: int
) -> None:
    how = [f"checkpoint={place}/net.safetensors", f"views={views}"]
    found, skipped = answers(ALONE, [*how, f"images={images}/val"])
    wrong = [Path(one.file).parent.name != one.prediction.classes[0] for one in found]
    settings = config.read("evaluate", [*HOW, *how, "columns=1"])
    counted = evaluation.evaluate_checkpoint(settings, evaluation.prepare(settings), ALONE)
    assert (len(found), skipped) == (10, [])
    assert len({one.prediction.classes[0] for one in found}) == 2
    assert 100 * sum(wrong) / 10 == counted.members[0].top1


def test_pair_and_replicas_answer_as_one_process(
    pair: Ranks, two_replicas: Ranks, place: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "z.png").touch()
    val = images / "val"
    listed = f"[{tmp_path},{val}/dark/1.png,{val}/light/2.png,{val}/light/3.png]"
    how = [f"checkpoint={place}/net.safetensors", f"images={listed}", "bad=skip"]
    more = ["neighbours=2", "training_images=5", f"out={tmp_path}/x.html"]
    more += ["precision=float64", "batch_size=2"]
    (one, bad), *others = (
        answers(ALONE, [*how, *more]),
        *pair.run(answers, [*how, *more, "columns=2"]),
        *two_replicas.run(answers, [*how, *more, "replicas=2"]),
    )
    assert [line.partition(":")[0] for line in bad] == [f"{tmp_path}/{x}.png" for x in "az"]
    assert "it is empty" in bad[1]
    for found, skipped in others:
        assert skipped == bad
        assert [each.file for each in found] == [each.file for each in one]
        assert shares(found) == pytest.approx(shares(one), rel=1e-9)
        for each, same in zip(found, one, strict=True):
            assert len(same.nearest) == 2
            assert [near[1] for near in each.nearest] == [near[1] for near in same.nearest]
            distances = [near[2] for near in same.nearest]
            assert [near[2] for near in each.nearest] == pytest.approx(distances, rel=1e-6)
    with pytest.raises(DataError, match=r"a\.png: cannot read image .* there is no other image"):
        answers(ALONE, [how[0], "bad=skip", f"images={tmp_path}"])
    with pytest.raises(DataError, match=r"a\.png: cannot read image .*, or use bad=skip"):
        answers(ALONE, [how[0], f"images={listed}"])


def test_an_export_needs_no_training_images_and_keeps_mean_and_names(place: Path) -> None:
    run, file = (find(str(place / name)) for name in ("run", "net.safetensors"))
    settings = config.read("evaluate", [f"checkpoint={place}/net.safetensors", "columns=1"])
    (prepared,) = evaluation.prepare(settings)
    assert len(prepared.images.train) == 0
    assert isinstance(run.source, Checkpoint)
    assert file.names == run.names == run.source.manifest["names"] == ["dark", "light"]
    for kept in (file.statistics, prepared.statistics):
        pairs = zip(vars(kept).values(), vars(run.statistics).values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_damaged_mean_is_an_error_and_a_missing_one_says_what_to_do(
    place: Path, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    with safe_open(place / "net.safetensors", "pt") as opened:
        about = opened.metadata()
    save_file({}, file, {**about, STATISTICS: "AAAA"})
    with pytest.raises(CheckpointError, match="does not describe the net it holds"):
        answers(ALONE, [f"checkpoint={file}", f"images={images}"])
    del about[STATISTICS]
    save_file({}, file, about)
    with pytest.raises(CheckpointError, match="has no mean image; export it again"):
        answers(ALONE, [f"checkpoint={file}", f"images={images}"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"names": ["a dark one", "a light one"]}, {"a dark one", "a light one"}),
        ({"names": None, "classes": None}, {"0", "1"}),  # of an older version
    ],
)
def test_classes_have_the_names_for_people_or_numbers(
    place: Path, images: Path, tmp_path: Path, change: dict[str, Any], expected: set[str]
) -> None:
    with safe_open(place / "net.safetensors", "pt") as opened:
        about = opened.metadata()
    record = {**json.loads(about["modelpar"]), **change}
    file = tmp_path / "net.safetensors"
    about = {**about, "modelpar": json.dumps(record)}
    save_file(load_file(place / "net.safetensors"), file, about)
    (one,), _ = answers(ALONE, [f"checkpoint={file}", f"images={images}/val/dark/1.png"])
    assert set(one.prediction.classes) == expected


# -- Python ---------------------------------------------------------------------------------------


def test_loaded_nets_predict_as_the_command_does(place: Path, images: Path) -> None:
    net = AlexNet.load(place / "net.safetensors")
    assert (net.classes, net.training) == (["dark", "light"], False)
    assert net.statistics.mean.shape == (3, 73, 73)
    x = torch.randn(2, 3, 64, 64)
    assert net.features(x).shape == (2, 256, 1, 1)
    assert net.fc7_units(x).shape == (2, 4096)
    assert torch.equal(net.fc8(net.fc7_units(x)), net(x))
    found, _ = answers(ALONE, [f"checkpoint={place}/net.safetensors", f"images={images}/val"])
    paths = [one.file for one in found]
    with Image.open(paths[0]) as opened:
        mixed = net.predict([opened, *map(Path, paths[1:])])
    assert [one.classes for one in mixed] == [one.prediction.classes for one in found]
    probabilities = [share for one in mixed for share in one.probabilities]
    assert probabilities == pytest.approx(shares(found), rel=1e-4)
    (alone,) = net.train().predict(paths[0])
    assert alone.classes == mixed[0].classes
    assert net.training
    run = AlexNet.load(str(place / "run"))
    step = AlexNet.load(place / "run" / "checkpoints" / "step-00000001")
    assert torch.equal(run.fc8.weight, step.fc8.weight)


def test_what_python_cannot_load_or_predict_is_one_line(
    place: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "BATCH", 1)
    net = AlexNet.from_recipe("code2012", 2, 64, seed=0)
    with pytest.raises(SettingsError, match=r"no mean image; use AlexNet\.load"):
        net.predict("x.png")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        AlexNet.load(tmp_path)
    with pytest.raises(SettingsError, match="views=2: use one of 1, 9, 10"):
        AlexNet.load(place / "run").predict("x.png", views=2)
    with pytest.raises(DataError, match=r"x\.png: cannot read image"):
        (net := AlexNet.load(place / "run").train()).predict([Image.new("RGB", (80, 80)), "x.png"])
    assert net.training  # also after an error in a later batch
    torch.nn.init.constant_(net.fc8.bias, torch.nan)
    with pytest.raises(DataError, match="values that are not finite"):
        net.predict(Image.new("RGB", (80, 80)))
    words = ["model.net=four_layer", "model.image_size=28", "model.norm=none"]
    other = untrained(tmp_path / "other.safetensors", images, *words)
    with pytest.raises(SettingsError, match="net=four_layer: is not AlexNet; use"):
        AlexNet.load(other)


def column(mesh: Mesh, path: str, picture: str) -> tuple[torch.Tensor, list[Prediction]]:
    assert mesh.pair is not None
    net = Column.load(path, Link.between(mesh.pair))
    with torch.no_grad():
        return net(torch.ones(2, 3, 64, 64)), net.predict(picture)


def test_a_loaded_column_is_half_of_the_loaded_net(pair: Ranks, place: Path, images: Path) -> None:
    path, picture = str(place / "net.safetensors"), str(images / "val/dark/1.png")
    net = AlexNet.load(path)
    with torch.no_grad():
        logits = net(torch.ones(2, 3, 64, 64))
    (own,) = net.predict(picture)
    for found, (same,) in pair.run(column, path, picture):
        assert torch.allclose(found, logits, rtol=1e-4, atol=1e-3)
        assert same.probabilities == pytest.approx(own.probabilities, rel=1e-3)


def documented(mesh: Mesh, text: str) -> torch.Tensor:
    """Run the documented lines in a rank, whose process group is there already."""
    names: dict[str, Any] = {}
    exec(re.sub(r"^dist\.init.*$", "", text, flags=re.MULTILINE), names)
    assert names["dist"].get_rank() == mesh.rank
    assert names["net"].fc8.weight.grad.shape == (10, 2048)
    with torch.no_grad():
        return names["net"].eval()(names["images"])


def test_the_ten_lines_of_two_processes_compute_what_the_whole_net_does(pair: Ranks) -> None:
    (text,) = [one for one in blocks(ROOT / "docs/python.md", "python") if "Column" in one]
    assert len([line for line in text.splitlines() if line and line[0] != "#"]) == 10
    torch.manual_seed(0)
    net = AlexNet.from_recipe("code2012", 10, 64).eval()
    with torch.no_grad():
        logits = net(torch.randn(8, 3, 64, 64))
    for found in pair.run(documented, text):
        assert torch.allclose(found, logits, rtol=1e-4, atol=1e-5)


# -- what is shown --------------------------------------------------------------------------------

SHARES = [0.9, 0.0625, 0.0375]
NAMES = ["tabby cat", "\u732b" * 30, "x" * 90]
ANSWER = Answer("a/<b>.png", Prediction([2, 0, 1], NAMES, SHARES), [])


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, columns: int | None) -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace")
    monkeypatch.setattr(stream, "isatty", lambda: columns is not None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns or 80))
    return [*predictions.lines(ANSWER)]


def test_bars_are_aligned_and_fit_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *rows = printed(monkeypatch, "utf-8", 40)
    assert head == "a/<b>.png"
    assert (
        rows[0] == "   90.0 %  \u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588   tabby cat"
    )
    assert rows[1] == "    6.2 %  \u258b           " + "\u732b" * 7 + "..."
    assert max(map(disp_len, rows)) <= 40
    assert disp_len(rows[2]) == 40
    assert printed(monkeypatch, "utf-8", 80)[1].index("tabby") == 33


def test_output_without_a_terminal_is_whole_and_ascii_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = printed(monkeypatch, "ascii", None)[1:]
    assert rows[0] == f"   90.0 %  {'#' * 18}    tabby cat"
    assert rows[2].endswith("x" * 90)


# -- the command in this process ------------------------------------------------------------------


def shown(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    settings = config.read("predict", [*HOW, *words])
    predictions.run(settings, prediction.prepare(settings), ALONE, None)
    return capfd.readouterr()


def test_page_has_everything_in_one_file_and_table_a_row_for_each_class(
    place: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "<i>&\udcff.png"
    name.write_bytes((images / "train/light/3.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no image")
    out = tmp_path / "new" / "page.html"
    how = [f"checkpoint={place}/net.safetensors", f"images={tmp_path}", "bad=skip"]
    said, skipped = shown(capfd, *how, f"out={out}", "neighbours=4")
    assert said == f"{out}: 1 image\n"
    assert skipped.startswith(f"modelpar: skipped: {tmp_path}/bad.png: cannot read image")
    page = out.read_text("utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 1 + 4
    assert "&lt;i&gt;&amp;\\udcff.png" in page
    assert "<i>" not in page
    assert not re.search(r"https?://|src=\"(?!data:)|<link|<script", page)
    assert "only 2 classes: dark, light." in page
    assert "color-scheme: light dark" in page
    first, *_, last = map(float, re.findall(r"<br>([^<]+)</figcaption>", page))
    assert first < 0.01 * last  # the nearest is the image itself
    shown(capfd, *how, f"out={tmp_path}/table.csv")
    rows = [*csv.DictReader((tmp_path / "table.csv").read_text("utf-8").splitlines())]
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert {row["label"]: row["class"] for row in rows} == {"0": "dark", "1": "light"}
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)
    assert len(shown(capfd, *how)[0].splitlines()) == 3


BAD = [
    (["images=nowhere.png"], 3, "images=nowhere.png: no such file or folder; use files"),
    (["images=[]"], 2, "images=[]: use one or more values"),
    (["images=null"], 2, "images=null: missing; add images=..."),
    (["images=['no*.png']"], 3, "images=no*.png: no image there"),
    (["images=[empty]"], 3, "images=empty: no image there"),
    (["images=empty/none.png", "checkpoint=nowhere"], 4, "nowhere: no checkpoint there"),
    ([], 2, "images: missing; add images=..."),
    (["images=empty", "out=x.txt"], 2, "use a name that ends in .html or .csv"),
    (["images=empty", "neighbours=2"], 2, "neighbours=2: requires out=FILE.html"),
    (["images=empty", "views=2"], 2, "views=2: use one of 1, 9, 10"),
]


@pytest.mark.parametrize(("words", "status", "said"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    given = [f"checkpoint={place}/net.safetensors"] if "checkpoint=nowhere" not in words else []
    monkeypatch.setattr(sys, "argv", ["modelpar-predict", *given, *words])
    with pytest.raises(SystemExit) as end:
        predict.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == status, line
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
