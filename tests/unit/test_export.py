"""Exported nets compute what the net computes from pixels, and say what they are."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from modelpar import Recipe, config
from modelpar.errors import CheckpointError, LaunchError, SettingsError
from modelpar.groups import DataSettings
from modelpar.images.augment import Augmentation, Statistics
from modelpar.interchange import caffe, exports, foreign
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, settings_of
from modelpar.training.exported import content_of
from modelpar.training.trained import TrainedNet, find

CLASSES, SIZE, STORED = 10, 64, 72
MADE = "trained for 7 steps"


@pytest.fixture(params=["code2012", pytest.param("caffe", marks=pytest.mark.slow)])
def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> TrainedNet:
    """Write a net with initial weights as net.safetensors in the working directory."""
    monkeypatch.chdir(tmp_path)
    plan = Plan(Recipe.named(request.param), CLASSES, SIZE)
    state = whole_net(plan, seed=1).state_dict()
    state["fc8.weight"] = state["fc8.weight"] * 50
    mean = 90 + 40 * torch.rand(3, STORED, STORED)
    record = {
        "plan": settings_of(plan),
        "data": asdict(DataSettings("photos", image_size=SIZE)),
        "step": 7,
        "seed": 1,
        "images_a_step": 8,
        "classes": [f"class {number}" for number in range(CLASSES)],
        "made": MADE,
        "errors": {"top1": 12.5, "top5": 1.25, "views": 10},
        "settings": "seed: 1\n",
    }
    statistics = Statistics(mean, torch.zeros(3), torch.eye(3))
    Path("net.safetensors").write_bytes(content_of(state, record, statistics))
    return find("net.safetensors")


def export(out: str, *words: str) -> None:
    exports.export(config.read("export", ["checkpoint=net.safetensors", f"out={out}", *words]))


def expected(trained: TrainedNet, stored: torch.Tensor, views: int) -> torch.Tensor:
    """Return the net's probabilities of stored images, as an evaluation computes them."""
    net = whole_net(trained.plan, 0).eval()
    net.load_state_dict(trained.weights(None))
    assert trained.statistics is not None
    augmentation = Augmentation(trained.statistics, SIZE, scaled=False, device="cpu")
    crops = (
        [augmentation.center_crop(stored)] if views == 1 else list(augmentation.ten_crop(stored))
    )
    with torch.no_grad():
        return torch.stack([functional.softmax(net(crop), 1) for crop in crops]).mean(0)


def crops(stored: torch.Tensor, views: int) -> list[torch.Tensor]:
    """Return the central crop, or ten, of pixels as they are."""
    end = STORED - SIZE
    places = [(end // 2, end // 2)]
    if views == 10:
        places += [(0, 0), (0, end), (end, 0), (end, end)]
    found = [stored[:, :, top : top + SIZE, left : left + SIZE] for top, left in places]
    return [*found, *(one.flip(-1) for one in found if views == 10)]


def test_a_flipped_bit_of_an_exported_file_is_noticed(trained: TrainedNet) -> None:
    content = Path("net.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    plan = content.index(b"per_window")
    for place in (plan, header, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        Path("damaged.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors: "):
            find("damaged.safetensors").weights(None)
    assert trained.weights(None).keys()


def stored_images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, STORED, STORED), dtype=torch.uint8)


@pytest.mark.slow
def test_onnx_computes_what_the_net_computes(trained: TrainedNet) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    export("net.onnx")
    session = onnxruntime.InferenceSession("net.onnx")
    stored = stored_images()
    for views in (1, 10):
        seen = [
            torch.from_numpy(session.run(["logits"], {"pixels": crop.float().numpy()})[0])
            for crop in crops(stored, views)
        ]
        found = torch.stack([functional.softmax(one, 1) for one in seen]).mean(0)
        exact = expected(trained, stored, views)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
        assert float(exact.max()) > 2 / CLASSES  # the weights matter
    one = session.run(None, {"pixels": crops(stored, 1)[0][:1].float().numpy()})[0]
    assert one.shape == (1, CLASSES)
    (about,) = onnx.load("net.onnx").metadata_props
    assert json.loads(about.value)["classes"] == [f"class {number}" for number in range(CLASSES)]
    with pytest.raises(SettingsError, match="opset=7: not supported, torch would write opset 18"):
        export("old.onnx", "opset=7")
    assert not Path("old.onnx").exists()


@pytest.mark.slow
def test_torch_export_computes_what_the_net_computes(trained: TrainedNet) -> None:
    export("net.pt2")
    files = {"modelpar": ""}
    program = torch.export.load("net.pt2", extra_files=files)
    assert json.loads(files["modelpar"])["made"] == MADE
    stored = stored_images()
    with torch.no_grad():
        seen = [
            functional.softmax(program.module()(crop.float()), 1) for crop in crops(stored, 10)
        ]
    torch.testing.assert_close(torch.stack(seen).mean(0), expected(trained, stored, 10))


def test_the_card_says_what_the_net_is(
    trained: TrainedNet, capsys: pytest.CaptureFixture[str]
) -> None:
    export("copy.safetensors")
    assert "copy.safetensors: 16 tensors, 20," in capsys.readouterr().out
    card = Path("copy.safetensors.md").read_text()
    recipe = trained.plan.recipe.name
    for said in (
        "# copy.safetensors\n",
        f"| recipe | `{recipe}` |",
        "| data | `photos`, 10 classes |",
        "| terms of the data | photographs of scikit-image, each under its own terms",
        "| error | top-1 12.50 %, top-5 1.25 %, 10 views per test image |",
        f"| made | {MADE} |",
        "| written | by modelpar ",
        "```yaml\nseed: 1\n```",
    ):
        assert said in card, said
    state = load_file("copy.safetensors")  # weights only
    assert state.keys() == whole_net(trained.plan, 0).state_dict().keys()
    again = find("copy.safetensors")
    assert again.statistics is not None
    assert trained.statistics is not None
    assert torch.equal(again.statistics.mean, trained.statistics.mean)


@pytest.mark.usefixtures("trained")
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(foreign, "import_module", missing)
    with pytest.raises(
        LaunchError, match=r"an \.onnx file requires onnx; run pip install 'modelpar"
    ):
        export("net.onnx")
    with pytest.raises(LaunchError, match="source: an"):
        caffe.read_onnx(Path("net.onnx"))
    with pytest.raises(SettingsError, match=r"opset=18: applies only to files that end in \.onnx"):
        export("net.pt2", "opset=18")
    with pytest.raises(SettingsError, match=r"ends in \.safetensors or \.onnx or \.pt2"):
        export("net.bin")
