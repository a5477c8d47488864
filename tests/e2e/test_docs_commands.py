"""Every shell command of README and docs runs, with small settings, or is left out for a reason.

The commands share one folder and run in the order of the pages: later ones use earlier runs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import MAINS, PAGES, ROOT, blocks, commands, program

SMALL = {
    "train": [
        "steps=2",
        "batch_size=32",
        "compile=false",
        "monitor.progress=false",
        "monitor.tensorboard=false",
        "views=1",
    ],
    "evaluate": ["monitor.progress=false", "views=1"],
    "figures": ["training_images=50"],
    "predict": ["training_images=50"],
    "prepare": ["data.num_classes=2", "size=73", "workers=0", "progress=false"],
    "benchmark": [
        *("precisions=[float32]", "batch_sizes=[8]", "image_size=64", "compile=false"),
        *("rounds=1", "steps=1"),
    ],
}
WITH = {
    "data=synthetic": ["model.image_size=64"],
    "data=imagenet": ["model.image_size=64", "model.num_classes=2"],
    "data=packed": ["model.image_size=64"],
    "experiment=wide_classes": ["model.image_size=64", "model.num_classes=2"],
    "search_images=10000": ["search_images=200"],
    "what=data": ["images=256"],
    "search=rate": ["hydra.sweeper.n_trials=2"],
}
# Without a choice of images a run is tested on the 1,008 photographs, in the README only.
NOISE = ["data=synthetic", "model.image_size=64", "model.num_classes=14"]
IMAGES = "data=|experiment=|search=|init\\."  # what has images of its own, or needs real ones
PAIRS = "torchrun|slow_link|columns=|replicas=|crossing"  # how many ranks there are
INSTALLS = "installs packages from the network; .ci/run does it in a fresh folder"
TESTS = "is what runs this test"
LEFT_OUT = {
    r"python3 -m venv": INSTALLS,
    r"(\.venv/bin/)?pip": INSTALLS,
    r"\. \.venv/bin/activate": "changes the shell",
    r"\.venv/bin/(pytest|ruff|pyright)": TESTS,
    r"bash \.ci/run": TESTS,
    r"python tests/faults/inject\.py": "takes minutes; tests/faults/test_faults.py runs it",
    r"eval": "changes the shell; tests/unit/test_help.py tests what it runs",
    r"modelpar-convert": "needs a file of another program; tests/unit/test_convert.py writes them",
    r".*caffe\.safetensors": "needs that file, too",
    r"docker": "needs Docker",
    r"tensorboard": "is a server, which does not end",
    r"launch/gpu_check\.sh": "needs a GPU",
    r"sbatch": "needs Slurm",
    r".*submitit_slurm": "needs Slurm",
    r".*data\.download=true": "downloads images",
    r".*glob\(\*": "takes minutes; tests/distributed/test_experiments.py trains each experiment",
}
NETWORK = shutil.which("ip") and shutil.which("tc") and os.geteuid() == 0
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CASES: dict[str, Path] = {}
for page in PAGES:
    for command in commands(page):
        CASES.setdefault(command, page)


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands as they are after an installation, and the run of the README."""
    root = tmp_path_factory.mktemp("docs")
    (root / "bin").mkdir()
    starts = {f"modelpar-{main}": f"-m modelpar.{main}" for main in MAINS}
    starts |= {"python": "", "torchrun": "-m torch.distributed.run"}
    for name, words in starts.items():
        script = root / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        script.chmod(0o755)
    (root / "launch").symlink_to(ROOT / "launch")
    for name in ("imagenet", "flowers", "fall2009", "fall2011"):  # two classes each
        (root / name).symlink_to(images)
    run(f"modelpar-train run_dir=runs/first {' '.join(SMALL['train'])}", root)
    for sweep in ("multirun/monday/noon", "runs/fashion"):  # those of sweeps that are left out
        shutil.copytree(root / "runs" / "first", root / sweep / "0")
    (root / ".venv").symlink_to(sys.prefix)  # the photographs of scikit-image
    for name in ("photo.jpg", "photos/a.png", "scans/b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "runs/first/conv1.png", root / name)
    for text in (text for page in PAGES for text in blocks(page, "python")):
        if text.startswith("# "):  # a name of a file, which torchrun starts
            (root / text.splitlines()[0].removeprefix("# ")).write_text(text)
    for name in "abc":  # nets that are averaged
        (root / "runs" / name).symlink_to("first")
    return root


def run(command: str, folder: Path) -> str:
    """Run a command as a shell does; return what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def reason(command: str) -> str:
    """Return why a command is left out, or an empty text."""
    for pattern, why in LEFT_OUT.items():
        if re.match(pattern, command):
            return why
    if command.startswith("launch/slow_link.sh") and not NETWORK:
        return "needs root, ip and tc"
    if "data=fashion_mnist" in command and not FASHION_MNIST.is_dir():
        return "needs Debian's package dataset-fashion-mnist"
    return ""


def shorter(word: str, jobs: int) -> str:
    """Return a word of a command with a few jobs, one rate, and the folder's own images."""
    key, _, value = word.partition("=")
    if key in {"seed", "experiment"}:
        return f"{key}={','.join(value.split(',')[:jobs])}"
    return word.replace("data.root=/data/", "data.root=").replace("100,1000,10000", "1000")


def small(command: str) -> str:
    """Return the command with fewer steps, jobs and images."""
    main, own = program(command)
    words = shlex.split(command.removeprefix(".venv/bin/"))
    if main not in SMALL or any(word.startswith("--") for word in own):
        return shlex.join(words)
    given = own if main != "prepare" else []
    extra = [*SMALL[main], *(word for key, more in WITH.items() if key in given for word in more)]
    if main == "train" and CASES[command].name != "README.md":
        # A third of a small run is the start of its second rank: in the README only.
        if not re.search(PAIRS, command):
            extra.append("columns=1")
        if not re.search(IMAGES, command):
            extra += NOISE
    if main == "benchmark" and "contenders" not in command:
        extra.append("contenders=[layers,pair]")
    if command.startswith("torchrun"):  # continues what the launcher has trained
        extra = [word.replace("steps=2", "steps=3") for word in extra]
    keys = {word.partition("=")[0] for word in extra}
    experiments = 2 if CASES[command].name == "README.md" else 1
    jobs = {"seed": 1 if "experiment=" in command else 2, "experiment": experiments}
    kept = [
        shorter(word, jobs.get(word.partition("=")[0], 0))
        for word in words
        if word.partition("=")[0] not in keys
    ]
    return shlex.join([*kept, *extra])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{p.stem}-{c[:60]}") for c, p in CASES.items()]
)
def test_every_command_of_the_pages_runs(command: str, folder: Path) -> None:
    if why := reason(command):
        pytest.skip(f"{command}: {why}")
    run(small(command), folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_the_pages_runs(page: Path, folder: Path) -> None:
    for number, text in enumerate(blocks(page, "python")):
        script = folder / f"{page.stem}{number}.py"
        script.write_text(text)
        if not text.startswith("# "):
            run(f"python {script.name}", folder)
