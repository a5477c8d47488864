"""modelpar.benchmark: its contenders train the same net, and its tables show what it measured."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from modelpar import AlexNet, config
from modelpar.bench import measure, reading, report
from modelpar.bench.floor import floor, gflop
from modelpar.bench.steps import Contender, Plain, make
from modelpar.bench.workers import bytes_sent
from modelpar.distributed import Mesh
from modelpar.errors import LaunchError, SettingsError
from modelpar.net.plan import Plan, Recipe

SMALL = ["image_size=64", "num_classes=10", "compile=false"]
ALONE = ("plain", "plain_compiled", "plain_reduce_overhead", "torchvision", "layers", "column")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("recipe", ["paper", "code2012", "clean", "caffenet"])
def test_plain_contender_computes_the_same_logits_as_our_net(recipe: str, *, sliced: bool) -> None:
    pooled = {"norm1_input": "pooled", "norm2_input": "pooled"} if recipe == "caffenet" else {}
    named = Recipe.named("caffe" if pooled else recipe)
    plan = Plan(replace(named, **pooled), 10, 64, dropout=0.0)
    plain, ours = Plain(plan, sliced=sliced).double(), AlexNet(plan, seed=1).double()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64) * 60
    torch.testing.assert_close(plain(images), ours(images), rtol=1e-11, atol=1e-11)


def test_gflop_of_a_step_agree_with_the_paper() -> None:
    # 665,784,864 multiplications of the convolutions, 58,621,952 of the rest (section 3.5);
    # forward, weights' and inputs' gradients, but none of conv1's inputs (105,415,200)
    plan = Plan(Recipe.named("code2012"))
    expected = 2 * (3 * (665_784_864 + 58_621_952) - 105_415_200) / 1e9
    assert gflop(plan, 2) == pytest.approx(2 * expected, rel=1e-6)
    assert gflop(plan, 128) == pytest.approx(529, rel=0.01)


def test_floor_is_that_counted_by_hand_for_an_h100() -> None:
    # 800 TFLOP/s in bfloat16 and 3 TB/s, images/s by batch
    plan = Plan(Recipe.named("paper"))
    speeds = {128: 96_000, 256: 120_000, 512: 133_000, 1024: 141_000}
    assert floor(plan, 128, 2, 800e12, 3e12) == pytest.approx(1.33e-3, rel=0.005)
    for size, speed in speeds.items():
        assert size / floor(plan, size, 2, 800e12, 3e12) == pytest.approx(speed, rel=0.01)


def test_floor_is_bound_by_products_or_by_bytes() -> None:
    plan = Plan(Recipe.named("paper"))
    products = gflop(plan, 128) * 1e9
    assert floor(plan, 128, 2, 1e12, 1e30) == pytest.approx(products / 1e12)
    update = 20 * 60_965_224  # bytes
    assert floor(plan, 2, 2, 1e30, 1e12) > (update + 6 * 58_621_952) / 1e12  # and fc6 to fc8
    assert floor(plan, 2, 4, 1e30, 1e12) < 2 * floor(plan, 2, 2, 1e30, 1e12)


@pytest.mark.parametrize("name", ALONE)
def test_contender_of_one_process_trains(name: str) -> None:
    contender = Contender(name, "float32", 4, config.read("benchmark", SMALL))
    first, step = cast("Any", make(contender, Mesh(torch.device("cpu"))))
    losses = [float(first()), float(step()), float(step())]
    assert torch.tensor(losses).isfinite().all()
    assert len(set(losses)) == 3


def test_column_receives_what_it_sends_and_has_half_the_work() -> None:
    plan = Plan(Recipe.named("paper"), 10, 64)
    peaks = {"float32": 1e3, "copy": 1e3}
    words = [*SMALL, "recipe=paper"]
    column, layers, pair = (
        measure.shares(Contender(name, "float32", 4, config.read("benchmark", words)), 0.1, peaks)
        for name in ("column", "layers", "pair")
    )
    assert layers["gflops"] == pytest.approx(10 * gflop(plan, 4))
    assert column["gflops"] == layers["gflops"] / 2
    assert column["share_of_peak"] == pair["share_of_peak"] == layers["share_of_peak"] / 2
    assert column["share_of_floor"] == pair["share_of_floor"] == layers["share_of_floor"] / 2
    assert layers["share_of_floor"] == pytest.approx(floor(plan, 4, 4, 1e12, 1e12) / 0.1)


@pytest.mark.parametrize(
    ("gpus", "contenders"),
    [
        (0, ["plain", "layers", "ddp", "tensor_parallel", "in_turn", "pair"]),
        (1, [*ALONE]),
        (2, [*ALONE, "pair"]),
    ],
)
def test_defaults_depend_on_the_device(
    gpus: int, contenders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    chosen = measure.with_defaults(config.read("benchmark", []))
    assert chosen.device == ("cuda" if gpus else "cpu")
    assert chosen.contenders == contenders
    assert chosen.precisions == (["bfloat16"] if gpus else ["float32", "bfloat16"])
    assert chosen.batch_sizes == ([128, 256, 512] if gpus else [128])
    assert chosen.steps == (20 if gpus else 2)
    timed = [(one.name, one.batch_size) for one in measure.contenders(chosen, by_default=True)]
    if gpus:  # the slowest, and those that take long to compile, with one batch
        sizes = {name: [size for each, size in timed if each == name] for name in contenders}
        assert sizes["plain"] == sizes["plain_reduce_overhead"] == sizes["torchvision"] == [128]
        assert sizes["plain_compiled"] == sizes["layers"] == sizes["column"] == [128, 256, 512]
    given = measure.contenders(chosen, by_default=False)
    assert len(given) == len(chosen.batch_sizes) * len(contenders) * len(chosen.precisions)
    words = ["contenders=[pair]", "precisions=[float64]", "batch_sizes=[6]", "steps=9"]
    given = measure.with_defaults(config.read("benchmark", words))
    assert given.device == ("cuda" if gpus == 2 else "cpu")  # as a run would
    assert given.contenders == ["pair"]
    assert (given.precisions, given.batch_sizes, given.steps) == (["float64"], [6], 9)


def test_bfloat16_is_left_out_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert measure.with_defaults(config.read("benchmark", [])).precisions == ["float32"]


class Failing:
    """Processes of a contender; with ``problem`` they cannot make their step."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem

    def begin(self, method: str) -> None:
        assert method == "prepare" or not self.problem

    def started(self) -> None:
        if self.problem:
            raise LaunchError(self.problem)

    def report(self) -> None:
        pass


@pytest.mark.parametrize("on_gpu", [False, True])
def test_contender_that_cannot_run_is_one_line(
    capsys: pytest.CaptureFixture[str], *, on_gpu: bool
) -> None:
    good: Any = [Failing(), Failing("no\nnet"), Failing()]
    assert measure._ready(good, on_gpu=on_gpu) == [good[0], good[2]]
    assert capsys.readouterr().err == "modelpar: no net\n"


class Timed:
    """Processes of a contender, of which ``last`` is the last turn that they survive."""

    failed, start_s = False, 0.0

    def __init__(self, name: str, last: int, *, peak: bool = True) -> None:
        self.contender = Contender(name, "float32", 4, config.read("benchmark", SMALL))
        self.last, self.peak = last, peak

    def ask(self, method: str, *_: Any) -> list[Any]:
        assert not self.failed
        if method == "peak" and self.peak:
            return [{"float32": 9.0}]
        self.failed = not self.last or method == "peak"
        self.last -= 1
        if self.failed:
            raise LaunchError(f"{self.contender.name}: killed")
        return [{"seconds": [1.0], "sent": 0, "peak_bytes": 0}]


@pytest.mark.parametrize("killed", ["plain", "layers"])
def test_contender_that_fails_later_leaves_the_results_of_the_others(
    killed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Any = [Timed(name, 1 if name == killed else 9) for name in ("plain", "layers")]
    peaks, rows = measure._measure(found, config.read("benchmark", ["rounds=3"]))
    (left,) = {"plain", "layers"} - {killed}
    assert [row["contender"] for row in rows] == [left]
    assert rows[0]["rounds_s"] == [1.0] * 3
    assert peaks == {"float32": 9.0}
    assert capsys.readouterr().err.count(f"modelpar: {killed}: killed\n") == 1


def test_contender_whose_peak_fails_leaves_the_results_of_the_others() -> None:
    found: Any = [Timed("layers", 9, peak=False), Timed("plain", 9)]
    peaks, rows = measure._measure(found, config.read("benchmark", ["rounds=1"]))
    assert [row["contender"] for row in rows] == ["plain"]
    assert peaks == {"float32": 9.0}


def test_net_that_cannot_be_built_is_refused_before_any_process_starts() -> None:
    with pytest.raises(SettingsError, match=r"^image_size=32: use 64 pixels or more"):
        measure.measure(config.read("benchmark", ["image_size=32"]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["contenders=[plane]"], "contenders=plane: did you mean plain?"),
        (["contenders=[]"], "contenders=[]: use one or more"),
        (["precisions=[float16]"], "precisions=float16: did you mean bfloat16?"),
        (["batch_sizes=[7]"], "batch_sizes=7: ddp halves a batch"),
        (["batch_sizes=[]"], "batch_sizes=[]: use one or more"),
        (["rounds=0"], "rounds=0: use 1 or more"),
        (["link.rates=[100]"], "link: requires two hosts; use launch/slow_link.sh"),
        (["link.hosts=[a,b]", "link.rates=[0]"], "link.rates=0.0: use 0.001 or more"),
        (["link.hosts=[a]"], "link: requires two hosts"),
        (["link.rate=3"], "did you mean link.rates?"),
    ],
    ids=str,
)
def test_bad_setting_is_a_one_line_error(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.read("benchmark", words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


class FakeWorkers:
    """Processes that have started."""

    def __init__(self, name: str) -> None:
        self.contender = Contender(name, "float32", 4, config.read("benchmark", []))
        self.start_s = 7.0


def row(name: str, rate: float | None, *seconds: float) -> dict[str, Any]:
    costs = {"sent": 1000, "peak_bytes": 2}
    turns = [
        [{"seconds": [one, one, 9 * one], **costs}, {"seconds": [one / 2] * 3, **costs}]
        for one in seconds
    ]
    return measure._row(FakeWorkers(name), rate, turns)  # type: ignore[arg-type]


def test_ratios_are_computed_round_by_round() -> None:
    plain, ddp = row("plain", None, 4.0, 8.0), row("ddp", None, 3.0, 6.0)
    ours, slow = row("pair", None, 1.0, 2.0), row("pair", 100.0, 2.0, 8.0)
    rows = [plain, ddp, ours, slow]
    assert ours["rounds_s"] == [1.0, 2.0]  # the median step of the slower process
    assert ours["wire_bytes"] == 1000
    assert measure.ratios(ours, rows)["plain float32"] == {"median": 4, "low": 4, "high": 4}
    assert measure.ratios(ours, rows)["ddp"]["median"] == 3
    assert "full rate" not in measure.ratios(ours, rows)
    found = measure.ratios(slow, rows)
    assert found["full rate"] == {"median": 0.375, "low": 0.25, "high": 0.5}
    assert found["plain"] == {"median": 1.5, "low": 1.0, "high": 2.0}  # one process has no link
    assert "ddp" not in found  # not measured at that rate


def test_bytes_of_this_process_are_counted_and_no_others() -> None:
    client = "import socket, sys; s = socket.create_connection(('localhost', int(sys.argv[1])));"
    client += "s.sendall(bytes(1_000_000)); s.recv(54_321, socket.MSG_WAITALL); s.recv(1)"
    with socket.create_server(("localhost", 0)) as server:
        command = [sys.executable, "-c", client, str(server.getsockname()[1])]
        with subprocess.Popen(command) as process, server.accept()[0] as connection:
            before, files = bytes_sent(), len(list(Path("/proc/self/fd").iterdir()))
            assert len(connection.recv(1_000_000, socket.MSG_WAITALL)) == 1_000_000
            assert bytes_sent() == before
            connection.sendall(bytes(54_321))
            assert bytes_sent() == before + 54_321
            assert len(list(Path("/proc/self/fd").iterdir())) == files
            connection.shutdown(socket.SHUT_WR)
            assert process.wait(60) == 0


def test_tables_show_what_was_measured() -> None:
    spread = {"median": 2.0, "low": 1.5, "high": 2.5}
    row: dict[str, Any] = {
        "contender": "pair",
        "what": "the two columns",
        "precision": "float32",
        "batch_size": 8,
        "link_mbit": None,
        "step_s": spread,
        "images_per_s": {key: 8 / value for key, value in spread.items()},
        "ratios": {"plain float32": spread, "ddp": spread},
        "share_of_peak": 0.5,
        "peak_bytes": 2_000_000,
        "wire_bytes": 3_000_000,
        "first_step_s": 7.0,
    }
    slow = {**row, "link_mbit": 100.0, "ratios": {"full rate": {**spread, "median": 0.9}}}
    result = {
        "machine": measure.machine(),
        "settings": {
            "image_size": 64,
            "num_classes": 10,
            "recipe": {"name": "paper"},
            "rounds": 2,
            "steps": 1,
        },
        "peaks": [{"batch_size": 8, "float32": 90.0}],
        "rows": [row, slow],
    }
    text = report.markdown(json.loads(json.dumps(result)))
    assert "| pair | float32 |  | 2.00 (1.50-2.50) | 4.0 | 2.00 (1.50-2.50) |  |" in text
    assert "| 50% | 2 | 3.0 | 7 |" in text
    assert (
        "| pair | float32 | 100 Mbit/s | 2.00 (1.50-2.50) | 4.0 |  |  |  | 0.90 (1.50-2.50) |"
        in text
    )
    assert "90 in float32" in text
    assert "- pair: the two columns" in text


def test_fewer_generated_images_than_a_batch_are_refused() -> None:
    settings = config.read("benchmark", ["what=data", "images=256", "batch_sizes=[512]"])
    with pytest.raises(SettingsError, match="batch_size=512"):
        reading.measure_reading(settings)


@pytest.mark.slow
def test_each_means_of_reading_is_measured() -> None:
    how = ["what=data", "images=256", "batch_sizes=[8]", "rounds=1", "steps=1", "threads=2"]
    how += SMALL
    result = reading.measure_reading(config.read("benchmark", how))
    assert [row["reader"] for row in result["rows"]] == ["imagefolder", "folder", "jpeg", "raw"]
    for row in result["rows"]:
        assert min(row["one_core"], row["all_cores"], row["training"]) > 0
        assert 0 <= row["waiting"] < 1
        assert f"| {row['reader']} | {row['one_core']:,.0f} (" in report.reading_table(result)
    assert min(result["preparing"].values()) > 0
    assert torch.get_num_threads() == 2  # of the net, although a preparation has one
