"""Weights of other programs: what the converted net computes, and files that are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import foreign
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from foreign import (
    CLASSES,
    SHAPES,
    UNITS,
    Weights,
    caffemodel,
    convnet,
    drawn,
    layers_of,
    py2_pickle,
)
from torch.nn import functional

from modelpar import AlexNet, Recipe, config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, RunError, SettingsError
from modelpar.groups import ModelSettings
from modelpar.images.augment import Augmentation
from modelpar.interchange import imports
from modelpar.net import paper
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import plan_for
from modelpar.net.weights import split
from modelpar.training import evaluation, prepare, runner, trained
from modelpar.training.checkpoint import newest, read_part

SLOW = pytest.mark.slow
CAFFE_MEAN = (104.0, 117.0, 123.0)  # blue, green, red


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give fc6 and fc7 few units, so that files are small: 9 MB, not 244."""
    rows = dict(paper.LAYERS)
    for name in ("fc6", "fc7"):
        rows[name] = replace(rows[name], outputs=UNITS // 2)
    monkeypatch.setattr(paper, "LAYERS", MappingProxyType(rows))
    monkeypatch.setattr(paper, "NETS", MappingProxyType({**paper.NETS, "two_columns": rows}))
    monkeypatch.chdir(tmp_path)


def caffe_logits(
    weights: Weights, images: torch.Tensor, kind: str, k: float = 1.0
) -> torch.Tensor:
    """Return Caffe's logits of RGB crops (N, 3, 227, 227), by torch's layers in float64."""
    both = {name: [torch.tensor(one).double() for one in pair] for name, pair in weights.items()}
    pool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.local_response_norm(x, 5, 1e-4, 0.75, k)

    x = images.flip(1).double() - torch.tensor(CAFFE_MEAN, dtype=torch.float64)[:, None, None]
    for name, (stride, padding, groups) in {
        "conv1": (4, 0, 1),
        "conv2": (1, 2, 2),
        "conv3": (1, 1, 1),
        "conv4": (1, 1, 2),
        "conv5": (1, 1, 2),
    }.items():
        x = functional.conv2d(x, *both[name], stride, padding, 1, groups).relu()
        if name in {"conv1", "conv2"}:
            x = pool(norm(x)) if kind == "alexnet" else norm(pool(x))
    x = pool(x).flatten(1)
    x = functional.linear(x, *both["fc6"]).relu()
    x = functional.linear(x, *both["fc7"]).relu()
    return functional.linear(x, *both["fc8"])


def converted(source: str | list[str], *words: str) -> evaluation.TrainedNet:
    """Convert and find the result, as evaluate and figures do."""
    listed = f"[{','.join(source)}]" if isinstance(source, list) else source
    imports.convert(config.read("convert", [f"source={listed}", "out=net.safetensors", *words]))
    return trained.find("net.safetensors")


def logits(found: evaluation.TrainedNet, stored: torch.Tensor) -> torch.Tensor:
    """Return the converted net's logits of the central crops of stored images, in float64."""
    net = whole_net(found.plan, 0)
    net.load_state_dict(found.weights(None))
    assert found.statistics is not None
    augmentation = Augmentation(
        found.statistics, found.plan.image_size, scaled=False, device="cpu"
    )
    with torch.no_grad():
        return net.double().eval()(augmentation.center_crop(stored).double())


def stored_images(count: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, generator=source)


@pytest.mark.parametrize(
    ("kind", "old"), [("alexnet", True), pytest.param("caffenet", False, marks=SLOW)]
)
def test_a_caffemodel_computes_what_caffe_computes(kind: str, *, old: bool) -> None:
    weights, images = drawn(), stored_images(1)
    Path("net.caffemodel").write_bytes(caffemodel(layers_of(weights, kind), old=old))
    found = converted("net.caffemodel")
    expected = caffe_logits(weights, images[:, :, 14:241, 14:241], kind)
    assert float((expected[0, 0] - expected[0, 1]).abs()) > 0.1
    torch.testing.assert_close(logits(found, images), expected, rtol=1e-12, atol=1e-12)
    reads = {"alexnet": "rectified"}.get(kind, "pooled")
    assert found.plan.recipe.norm1_input == reads
    chosen = converted("net.caffemodel", "recipe=paper").plan.recipe  # the file decides these
    assert (chosen.norm1_input, chosen.norm_k, chosen.norms) == (reads, 1, "across_both")
    text = Path("net.safetensors.md").read_text()
    assert "converted from the caffemodel net.caffemodel (sha256 " in text
    assert "123.00, 117.00, 104.00 (red, green, blue, 0-255)" in text


@SLOW
def test_k_and_a_mean_image_are_those_of_the_files() -> None:
    weights, images = drawn(), stored_images(1)
    Path("net.caffemodel").write_bytes(caffemodel(layers_of(weights, "alexnet", k=2), old=False))
    mean = np.random.default_rng(1).uniform(90, 130, (3, 256, 256)).astype("f4")
    Path("mean.binaryproto").write_bytes(foreign.blob(mean, old=True))
    np.save("mean.npy", mean)
    window = (
        torch.tensor(mean)[:, 14:241, 14:241].flip(0)
        - torch.tensor(CAFFE_MEAN[::-1])[:, None, None]
    )
    expected = caffe_logits(
        weights, images[:, :, 14:241, 14:241] - window.double(), "alexnet", k=2
    )
    for name in ("mean.binaryproto", "mean.npy"):
        found = logits(converted("net.caffemodel", f"mean={name}"), images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the mean is float32


@SLOW
def test_a_converted_net_is_evaluated_with_its_own_mean_and_trained_on(images: Path) -> None:
    Path("net.caffemodel").write_bytes(caffemodel(layers_of(drawn(), "alexnet"), old=True))
    converted("net.caffemodel")
    words = ["checkpoint=net.safetensors", f"data.root={images}", "columns=1", "workers=0"]
    settings = config.read("evaluate", words)
    (prepared,) = evaluation.prepare(settings)
    assert len(prepared.images.train) == 0  # which would be read for their mean image
    assert prepared.images.stored_size == 256
    assert prepared.statistics.mean[:, 0, 0].tolist() == [123, 117, 104]
    alone = Mesh(torch.device("cpu"))
    assert evaluation.evaluate_checkpoint(settings, [prepared], alone).members[0].samples == 10
    layers = f"[{','.join(SHAPES)}]"
    words = ["recipe=caffe", "recipe.lr=0", "model.image_size=227", "data=imagefolder", "steps=1"]
    words += [f"data.root={images}", "init.checkpoint=net.safetensors", f"init.layers={layers}"]
    words += ["columns=1", "batch_size=4", "compile=false", "workers=0"]
    train = config.read("train", [*words, "monitor.progress=false", "monitor.tensorboard=false"])
    runner.train(train, prepare.prepare(train, Path("run")), alone, Path("run"))
    started, given = newest(Path("run")), safetensors.torch.load_file("net.safetensors")
    assert started is not None
    weights = read_part(started, "weights", None)
    assert all(torch.equal(weights[key], one) for key, one in given.items())


# -- files that are refused ----------------------------------------------------------------------


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def without(name: str) -> bytes:
    layers = [one for one in layers_of(drawn(), "alexnet") if one[0] != name]
    return caffemodel(layers, old=False)


def wider() -> bytes:
    weights = drawn()
    weights["conv4"] = (np.zeros((384, 384, 3, 3), "f4"), weights["conv4"][1])
    return caffemodel(layers_of(weights, "alexnet"), old=True)


def longer() -> bytes:
    content = caffemodel(layers_of(drawn(), "alexnet"), old=True)
    before, _, after = content.rpartition(foreign.integer(4, UNITS))  # the width of fc8
    return before + foreign.integer(4, UNITS + 1) + after


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut short": (
        lambda: cut(0.7)(caffemodel(layers_of(drawn(), "alexnet"), old=True)),
        "damaged, or not what its name says",
    ),
    "text": (lambda: b"not a message at all", "damaged, or not what its name says"),
    "empty": (lambda: b"", "has 0 layers with weights and biases; AlexNet has 8"),
    "no fc7": (lambda: without("fc7"), "has 7 layers with weights and biases; AlexNet has 8"),
    "no pool": (lambda: without("Pooling2"), "in the order LRN, Pooling, LRN, Pooling, which is"),
    "another net": (wider, "conv4.weight has shape (384, 384, 3, 3), this net's has (384, 192"),
    "another norm": (
        lambda: caffemodel(layers_of(drawn(), "alexnet", alpha=1e-3), old=True),
        "response normalization differs from the paper's (size 5, alpha 0.001, beta 0.75, k 1)",
    ),
    "fewer numbers": (longer, "a blob of shape (1, 1, 2, 17) has 32 numbers; the file is damaged"),
}


QUICK = ("cut short", "text", "another net")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in REFUSED]
)
def test_another_caffemodel_is_refused_in_one_line(name: str) -> None:
    make, said = REFUSED[name]
    Path("net.caffemodel").write_bytes(make())
    with pytest.raises(CheckpointError) as error:
        converted("net.caffemodel")
    assert said in str(error.value)
    assert "net.caffemodel: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("net.safetensors").exists()


# -- cuda-convnet --------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [pytest.param("hs", marks=SLOW), "dropout"])
def test_a_checkpoint_of_cuda_convnet_has_our_weights(dropout: str) -> None:
    weights = drawn()
    Path("91.1").write_bytes(py2_pickle(convnet(weights, dropout)))
    mean = np.arange(3 * 256 * 256, dtype="f4").reshape(-1, 1)
    Path("batches.meta").write_bytes(py2_pickle({"data_mean": mean, "label_names": ["n01440764"]}))
    found = converted("91.1", "mean=batches.meta")
    state = found.weights(None)
    for name, pair in weights.items():
        scale = 2 if dropout == "dropout" and name in {"fc7", "fc8"} else 1
        for kind, expected in zip(("weight", "bias"), pair, strict=True):
            scaled = scale * expected if kind == "weight" else expected
            assert np.array_equal(state[f"{name}.{kind}"].numpy(), scaled), (name, kind)
    assert found.plan.recipe == Recipe.named("code2012")
    assert found.statistics is not None
    assert torch.equal(found.statistics.mean.flatten(), torch.arange(3 * 65536).float())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02cos\nsystem\n(U\x02lstR.", "holds os.system, which no file of cuda-convnet"),
        (b"\x80\x02cnumpy\nload\n(U\x02lstR.", "holds numpy.load, which no file of"),
        (b"", "damaged, or not what its name says"),
        (py2_pickle({"model_state": {}}), "damaged, or not what its name says"),
        (py2_pickle({"model_state": {"layers": {}}}), "has 0 layers with weights and biases"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(content: bytes, said: str) -> None:
    Path("91.1").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"91\.1: ") as error:
        converted("91.1")
    assert said in str(error.value)


# -- state dicts and ONNX ------------------------------------------------------------------------


def ours() -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": torch.tensor(one)
        for name, pair in drawn().items()
        for kind, one in zip(("weight", "bias"), pair, strict=True)
    }


@SLOW
def test_state_dicts_of_a_net_and_of_both_columns_are_read() -> None:
    state = ours()
    torch.save({"state_dict": {f"module.{key}": one for key, one in state.items()}}, "whole.pt")
    columns = [{key: one.clone() for key, one in part.items()} for part in split(state)]
    torch.save(columns[0], "a.pth")
    safetensors.torch.save_file(columns[1], "b.safetensors")
    for source in ("whole.pt", ["a.pth", "b.safetensors"]):
        found = converted(source, "recipe=paper")
        weights = found.weights(None)
        assert all(torch.equal(weights[key], one) for key, one in state.items())
        assert found.plan.recipe == Recipe.named("paper")
        assert found.statistics is None  # an evaluation measures it
    refusals: list[tuple[Any, str, type[RunError]]] = [
        ("a.pth", "holds one column; use source=[FILE,FILE], column 0 first", CheckpointError),
        (["b.safetensors", "a.pth"], "fc8.bias is missing", CheckpointError),
        ("no.pt", "no such file", CheckpointError),
    ]
    for source, said, kind in refusals:
        with pytest.raises(kind) as error:
            converted(source, "recipe=paper")
        assert said in str(error.value)
    with pytest.raises(SettingsError, match="does not record its recipe; add recipe=NAME"):
        converted("whole.pt")


def test_a_pt_file_that_would_run_code_is_refused() -> None:
    torch.save({"conv1.weight": Path("x")}, "net.pt")
    with pytest.raises(CheckpointError, match=r"net\.pt: damaged, or not what its name says"):
        converted("net.pt", "recipe=paper")


@SLOW
def test_a_state_dict_of_the_net_with_one_column_is_a_whole_net() -> None:
    plan = plan_for(Recipe.named("paper"), ModelSettings(net="one_column"), 4, 224)
    torch.save(AlexNet(plan, seed=0).state_dict(), "one.pt")
    assert converted("one.pt", "recipe=paper").plan.net == "one_column"
    np.save("mean.npy", np.zeros((3, 256, 300), np.float32))
    with pytest.raises(CheckpointError, match=r"mean=.*: has shape \(3, 256, 300\); use a mean"):
        converted("one.pt", "recipe=paper", "mean=mean.npy")
    torch.save({"conv1.bias": torch.zeros(3)}, "two.pt")
    with pytest.raises(CheckpointError, match=r"one\.pt, .*two\.pt: are not the two columns of"):
        converted(["one.pt", "two.pt"], "recipe=paper")


@SLOW
def test_torchvisions_state_dict_is_its_net() -> None:
    net = torchvision.models.AlexNet(CLASSES).eval()
    torch.save(net.state_dict(), "alexnet.pth")
    found, images = converted("alexnet.pth"), stored_images(1)
    normalize = torchvision.transforms.v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crops = images[:, :, 16:240, 16:240].double() / 255
    with torch.no_grad():
        expected = net.double()(normalize(crops))
    torch.testing.assert_close(logits(found, images), expected, rtol=1e-4, atol=1e-5)


@SLOW
@pytest.mark.parametrize("kind", ["alexnet", "caffenet"])
def test_an_onnx_file_of_caffe2_has_the_weights_of_the_caffemodel(kind: str) -> None:
    onnx = pytest.importorskip("onnx")
    weights, nodes, initializers = drawn(), list[Any](), list[Any]()
    kinds = {"Convolution": "Conv", "InnerProduct": "Gemm", "Pooling": "MaxPool", "ReLU": "Relu"}
    for name, what, blobs, _ in layers_of(weights, kind)[1:]:
        given = [f"{name}_w_0", f"{name}_b_0"] if blobs else []
        more: dict[str, Any] = {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
        more = more if what == "LRN" else {"transB": 1} if what == "InnerProduct" else {}
        op = kinds.get(what, what)
        nodes.append(onnx.helper.make_node(op, ["x", *given], ["x"], name=name, **more))
        initializers += map(onnx.numpy_helper.from_array, blobs, given)
    graph = onnx.helper.make_graph(nodes, "AlexNet", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), "net.onnx")
    Path("net.caffemodel").write_bytes(caffemodel(layers_of(weights, kind), old=False))
    found, expected = (converted(f"net.{ending}") for ending in ("onnx", "caffemodel"))
    assert found.plan == expected.plan
    state = found.weights(None)
    assert all(torch.equal(state[key], one) for key, one in expected.weights(None).items())
    Path("net.onnx").write_bytes(Path("net.onnx").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"net\.onnx: damaged, or not what its name says"):
        converted("net.onnx")
