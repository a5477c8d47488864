"""The average of several nets equals one made by hand, on the pair and in one process."""

import json
import math
import random
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import Ranks
from safetensors.torch import save_file
from torch.nn import functional

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.images.augment import Augmentation
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import settings_of
from modelpar.training import evaluation, prepare
from modelpar.training.averaging import STEPS, Member, Pass, search, split
from modelpar.training.evaluation import Evaluation
from modelpar.training.exported import METADATA

ALONE = Mesh(torch.device("cpu"))
# The second and the third net see larger images, and other nets and recipes.
NETS = {
    "a": ("model.image_size=64",),
    "b": ("model.image_size=80", "recipe=paper", "seed=1"),
    "c": ("model.image_size=64", "model.net=no_crossing", "model.norm=none", "seed=2"),
}


def untrained(file: Path, root: Path, *words: str) -> Path:
    """Write a net as an export does, with initial weights and large logits."""
    how = ["data=imagefolder", f"data.root={root}", "columns=1", "workers=0", "batch_size=8"]
    settings = config.read("train", [*how, *words])
    found = prepare.prepare(settings)
    state = whole_net(found.plan, settings.seed).state_dict()
    last = [name for name in state if name.endswith("weight")][-1]
    state[last] = state[last] * 50
    record = {"plan": settings_of(found.plan), "data": asdict(found.data), "step": 0, "seed": 0}
    about = json.dumps({**record, "images_a_step": 8})
    save_file(state, file, {METADATA: about})
    return file


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    for name, words in NETS.items():
        untrained(folder / f"{name}.safetensors", images, *words)
    return folder


def read(nets: Path, names: str, *more: str) -> Any:
    listed = ",".join(str(nets / f"{name}.safetensors") for name in names)
    how = ["precision=float64", "workers=0", "batch_size=4", *more]
    return config.read("evaluate", [f"checkpoint=[{listed}]", *how])


def evaluated(mesh: Mesh, nets: Path, names: str, *more: str) -> Evaluation:
    settings = read(nets, names, *more)
    return evaluation.evaluate_checkpoint(settings, evaluation.prepare(settings), mesh)


@cache
def by_hand(path: Path, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one net's probabilities (N, classes) of all test images, and their labels."""
    settings = config.read("evaluate", [f"checkpoint={path}", "columns=1"])
    (found,) = evaluation.prepare(settings)
    net = whole_net(found.trained.plan, 0)
    net.load_state_dict(found.trained.weights(None))
    net = net.double().eval()
    size = found.trained.plan.image_size
    augmentation = Augmentation(found.statistics, size, scaled=False, device="cpu")
    test = [found.images.test[row] for row in range(len(found.images.test))]
    stored = torch.stack([image for image, _ in test])
    crops = [augmentation.center_crop(stored)] if views == 1 else [*augmentation.ten_crop(stored)]
    with torch.no_grad():
        each = [functional.softmax(net(crop.double()), 1) for crop in crops]
    return torch.stack(each).mean(0), torch.tensor([label for _, label in test])


def wrong(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((scores.argmax(1) != labels).double().mean())


@pytest.mark.parametrize(
    ("names", "views"), [("ab", 1), pytest.param("abc", 10, marks=pytest.mark.slow)]
)
def test_average_equals_one_made_by_hand(pair: Ranks, nets: Path, names: str, views: int) -> None:
    parts = [by_hand(nets / f"{name}.safetensors", views) for name in names]
    labels = parts[0][1]
    mean = torch.stack([scores for scores, _ in parts]).mean(0)
    top5 = 10 * count_of(mean[None], labels, torch.ones(1).double())[0]  # % of ten images
    one = evaluated(ALONE, nets, names, f"views={views}", "columns=1")
    for found in (one, *pair.run(evaluated, nets, names, f"views={views}")):
        for errors, (scores, _) in zip(found.members, parts, strict=True):
            assert errors.top1 == wrong(scores, labels)
            loss = -float(scores.gather(1, labels[:, None]).log().mean())
            assert errors.loss == pytest.approx(loss, rel=1e-9)
        assert found.average is not None
        assert found.average.top1 == wrong(mean, labels)
        assert found.average.top5 == 100 * top5
        loss = -float(mean.gather(1, labels[:, None]).log().mean())
        assert found.average.loss == pytest.approx(loss, rel=1e-9)
        assert found.average.samples == len(labels) == 10
        assert len({errors.loss for errors in found.members}) == len(names)
        assert (found.weights, found.searched) == ([1 / len(names)] * len(names), 0)


def test_searched_weights_are_used_on_images_that_were_not_searched(
    pair: Ranks, nets: Path
) -> None:
    words = ("weights=search", "search_images=4")
    one = evaluated(ALONE, nets, "ab", *words, "columns=1")
    first, _ = pair.run(evaluated, nets, "ab", *words)
    searched, reported = split(range(10), 4)
    assert sorted([*searched, *reported]) == [*range(10)]
    assert len(searched) == one.searched == first.searched == 4
    assert one.weights == first.weights
    assert math.fsum(one.weights) == pytest.approx(1)
    scores, labels = zip(*(by_hand(nets / f"{name}.safetensors", 1) for name in "ab"), strict=True)
    assert one.weights == search(torch.stack(scores)[:, searched], labels[0][searched], ALONE)
    mean = sum(weight * each for weight, each in zip(one.weights, scores, strict=True))
    assert isinstance(mean, torch.Tensor)
    loss = -float(mean[reported].gather(1, labels[0][reported][:, None]).log().mean())
    assert one.average is not None
    assert one.average.samples == 6
    assert one.average.loss == pytest.approx(loss, rel=1e-9)


def test_search_finds_what_trying_all_weights_finds() -> None:
    """One net knows half of the classes, one the others, and one nothing."""
    labels = torch.randint(0, 12, (300,))
    right = functional.one_hot(labels, 12).double()
    low = (labels < 6)[:, None]
    noise = torch.rand(3, 300, 12, dtype=torch.float64)
    three = noise + torch.stack([right * low, 0.5 * right * ~low, 0 * right])
    three /= three.sum(2, keepdim=True)
    two, equal = three[:2], torch.full((3,), 1 / 3, dtype=torch.float64)
    grid = [torch.tensor(point).double() / STEPS for point in product(range(STEPS + 1), repeat=2)]
    best = min(count_of(two, labels, point) for point in grid if point.any())
    found = torch.tensor(search(two, labels, ALONE), dtype=torch.float64)
    assert count_of(two, labels, found) == best < count_of(two, labels, equal[:2])
    found = torch.tensor(search(three, labels, ALONE), dtype=torch.float64)
    assert count_of(three, labels, found) < count_of(three, labels, equal)
    assert found[2] < found[:2].min()


def test_search_keeps_a_net_where_none_would_have_fewer_errors() -> None:
    """Without any net each answer would be class 0, which is right for most of these images."""
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3])
    worst = functional.one_hot((labels + 1) % 12, 12).double()
    better = torch.where(labels[:, None] == 1, worst.roll(-1, 1), worst.roll(1, 1)) * 0.9
    found = search(torch.stack([worst, better]), labels, ALONE)
    assert math.fsum(found) == pytest.approx(1)


def test_weights_are_searched_on_the_images_of_another_folder(
    pair: Ranks, nets: Path, images: Path, tmp_path: Path
) -> None:
    names = [path.name for path in (images / "val").iterdir()]
    root = other_images(tmp_path / "other", *names)
    words = ("weights=search", f"search_root={root}")
    one = evaluated(ALONE, nets, "ab", *words, "columns=1")
    first, _ = pair.run(evaluated, nets, "ab", *words)
    whole = read(nets, "ab", "columns=1", f"data.root={root}", "weights=search")
    found = evaluation.prepare(whole)
    members = [
        Member(
            evaluation.loaded(whole, each.trained, ALONE),
            each.images,
            Augmentation(
                each.statistics, each.trained.plan.image_size, scaled=False, device="cpu"
            ),
        )
        for each in found
    ]
    expected = Pass(members, ALONE, 4, 1, 0).search(range(16))
    assert one.weights == first.weights == expected
    assert one.searched == first.searched == 16
    assert one.average is not None
    assert one.average.samples == 10


def count_of(
    answers: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[int, int]:
    """Wrong in five answers and in one, by a full sort."""
    order = torch.tensordot(weights, answers, 1).argsort(1, descending=True)
    hits = order == labels[:, None]
    return int((~hits[:, :5].any(1)).sum()), int((~hits[:, 0]).sum())


def test_groups_are_not_divided_between_search_and_report() -> None:
    groups = [random.Random(0).randrange(9) for _ in range(60)]
    searched, reported = split(groups, 20)
    assert not {groups[row] for row in searched} & {groups[row] for row in reported}
    assert sorted(searched + reported) == [*range(60)]
    assert 20 <= len(searched) < 20 + max(groups.count(group) for group in groups)


def test_lines_and_file_have_members_and_average(
    nets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "average.json"
    settings = read(nets, "ab", "columns=1", "batch_size=10", f"out={out}")
    evaluation.run(settings, evaluation.prepare(settings), ALONE, None)
    found = json.loads(out.read_text())
    assert found["checkpoints"] == [str(nets / f"{name}.safetensors") for name in "ab"]
    lines = capsys.readouterr().out.splitlines()
    for line, errors in zip(lines, [*found["members"], found["average"]], strict=True):
        assert errors["samples"] == 10
        assert f"top-1 error {errors['top1']:.4f} % (standard error" in line
        assert f"loss {errors['loss']:.6f}" in line
    assert lines[0].startswith(f"{nets / 'a.safetensors'}: top-1 error ")
    assert lines[2].startswith("average of 2 nets, equal weights: top-1 error ")
    with pytest.raises(CheckpointError, match=r"out=/proc/no/a\.json: not written"):
        evaluation.write_out(Path("/proc/no/a.json"), "")


def test_skipped_files_are_named_once_for_all_nets(
    nets: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = other_images(tmp_path, *(path.name for path in (images / "val").iterdir()))
    (next((root / "val").iterdir()) / "moving.gif").touch()
    settings = read(nets, "ac", "columns=1", f"data.root={root}")
    evaluation.run(settings, evaluation.prepare(settings), ALONE, None)
    assert capsys.readouterr().err == f"modelpar: {root}: skipped files: 1 .gif\n"


def other_images(folder: Path, *classes: str) -> Path:
    for part, name in product(("train", "val"), classes):
        (folder / part / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (80, 80), (number, 0, 0)).save(folder / part / name / f"{number}.png")
    return folder


def test_nets_of_other_classes_or_images_are_refused(
    nets: Path, images: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in (images / "val").iterdir())
    for name, classes in (("names", ["cat", "dog"]), ("more", [*names, "zoo"]), ("same", names)):
        root = other_images(tmp_path / f"images {name}", *classes)
        untrained(tmp_path / f"{name}.safetensors", root, "model.net=four_layer", *NETS["a"])
    for name, expected in (
        (
            "names",
            "its classes are not those of .*/a.safetensors; average nets with the same classes",
        ),
        (
            "more",
            "its classes are not those of .*/a.safetensors; average nets with the same classes",
        ),
        (
            "same",
            r"its test images are not those of .*/a.safetensors; add data=NAME, and data\.root=",
        ),
    ):
        words = [
            f"checkpoint=[{nets / 'a.safetensors'},{tmp_path / name}.safetensors]",
            "columns=1",
        ]
        with pytest.raises(SettingsError, match=f"^checkpoint=.*{name}.safetensors: {expected}"):
            evaluation.prepare(config.read("evaluate", words))
    root = [f"data.root={images}"]
    assert len(evaluation.prepare(config.read("evaluate", [*words, *root]))) == 2
    with pytest.raises(
        SettingsError, match=r"same\.safetensors: its net has one column; use columns=1"
    ):
        evaluation.prepare(config.read("evaluate", [words[0], *root]))


@pytest.mark.parametrize(
    ("words", "error", "expected"),
    [
        (["checkpoint=[]"], SettingsError, r"checkpoint=\[\]: use a path, or a list of paths"),
        (["checkpoint=null"], SettingsError, "checkpoint=null: missing; add checkpoint=..."),
        (["checkpoint={a: b}"], SettingsError, "not read as a path; quote it"),
        (["checkpoint=x", "weights=search"], SettingsError, "weights=search: needs several nets"),
        (["checkpoint=[x,y]", "search_images=3"], SettingsError, "requires weights=search"),
        (["checkpoint=[x,y]", "search_root=z"], SettingsError, "requires weights=search"),
        (["checkpoint=[x,y]"], CheckpointError, "checkpoint=x: no checkpoint there"),
        (["checkpoint=x", "out=a.txt"], SettingsError, r"out=.*a.txt: .* ends in \.json"),
        (
            ["checkpoint=x", "weights=best"],
            SettingsError,
            "weights=best: use one of equal, search",
        ),
    ],
    ids=str,
)
def test_settings_that_fit_no_average_are_refused(
    words: list[str], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        evaluation.prepare(config.read("evaluate", words))


def test_search_on_fewer_images_than_replicas_is_refused(nets: Path) -> None:
    words = ("columns=1", "replicas=2", "weights=search", "search_images=1")
    with pytest.raises(SettingsError, match="would be searched with replicas=2"):
        evaluation.prepare(read(nets, "ab", *words))


@pytest.mark.parametrize("count", [10, 99])
def test_search_on_all_test_images_is_refused(nets: Path, count: int) -> None:
    words = ("columns=1", "weights=search", f"search_images={count}")
    with pytest.raises(SettingsError, match=f"search_images={count}: 10 of 10 test images"):
        evaluation.prepare(read(nets, "ab", *words))


def test_search_on_the_reported_or_on_two_choices_of_images_is_refused(
    nets: Path, images: Path, tmp_path: Path
) -> None:
    words = ("columns=1", "weights=search", f"search_root={images}")
    with pytest.raises(SettingsError, match="has the evaluated images; use others"):
        evaluation.prepare(read(nets, "ab", *words))
    with pytest.raises(SettingsError, match=r"search_images=3: .* leave one of them out"):
        evaluation.prepare(read(nets, "ab", *words, "search_images=3"))
    words = ("columns=1", "weights=search", f"search_root={other_images(tmp_path, 'a', 'b')}")
    with pytest.raises(
        DataError, match=r"search_root=.*: has other classes than the evaluated images"
    ):
        evaluation.prepare(read(nets, "ab", *words))


def test_a_fifth_of_the_images_is_searched_by_default(nets: Path) -> None:
    settings = read(nets, "ab", "columns=1", "weights=search")
    searched, reported = evaluation.rows(settings, evaluation.prepare(settings))
    assert (len(searched), len(reported)) == (2, 8)
