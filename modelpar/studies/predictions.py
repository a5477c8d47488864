"""What ``modelpar-predict`` shows: lines on the terminal, a table, or a page with the pictures."""

import base64
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.utils import disp_len, disp_trim

from modelpar import tables
from modelpar.distributed import Mesh
from modelpar.errors import say
from modelpar.files import write_out
from modelpar.images.samples import square
from modelpar.schemas import PredictSettings
from modelpar.studies import html
from modelpar.training.prediction import Answer, Prepared, predict_files

HEAD: Final = ("file", "rank", "label", "class", "probability")
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"  # a bar's end, by eighths of a character
BAR: Final = 20  # characters of the longest bar; half of that where lines are short
SHORT: Final = 60  # characters
PICTURE: Final = 256  # pixels: the least side of a picture of the page
NAMED: Final = 20  # how many classes the page names
STYLE: Final = """\
h1 { font-size: 1.5rem }
main { display: grid; gap: 1.25rem; margin-top: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
article { border: 1px solid #8884; border-radius: .6rem; overflow: hidden; padding: 1rem }
article > img { aspect-ratio: 1; border-radius: .3rem; display: block; margin: auto; max-width: 16rem; width: 100% }
h2 { font-size: .95rem; margin: .7rem 0 .3rem; overflow-wrap: anywhere }
ol { list-style: none; margin: 0; padding: 0 }
li { display: flex; gap: .5rem; justify-content: space-between; margin-top: .35rem; position: relative; padding: 0 0 .4rem }
li::before, li::after { border-radius: 2px; bottom: 0; content: ""; height: 5px; left: 0; position: absolute; width: 100% }
li::before { background: #8883 }
li::after { background: #3b82c4; width: var(--share) }
li span:first-child { overflow-wrap: anywhere }
li span:last-child { font-variant-numeric: tabular-nums; white-space: nowrap }
p { margin: .9rem 0 .3rem }
article div { display: grid; gap: .4rem; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) }
figure { margin: 0 }
figure img { border-radius: .2rem; display: block; width: 100% }
figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }
"""  # noqa: E501 - a rule a line


def run(settings: PredictSettings, prepared: Prepared, mesh: Mesh, _run_dir: None) -> None:
    """Predict; rank 0 prints the answers, or writes them to ``out`` and prints a line."""
    answers, skipped = predict_files(settings, prepared, mesh)
    with mesh.all_or_none():
        if mesh.rank:
            return
        for line in skipped:
            say(f"skipped: {line}")
        out = settings.out
        if out is None:
            shown = [text for one in answers for text in (*lines(one), "")]
            print("\n".join(shown[:-1]), flush=True)  # noqa: T201
            return
        table = out.endswith(".csv")
        write_out(
            out,
            tables.comma_separated(HEAD, rows(answers))
            if table
            else page(settings, prepared, answers),
        )
        print(f"{out}: {len(answers):,} image{'s' * (len(answers) > 1)}", flush=True)  # noqa: T201


def rows(answers: Sequence[Answer]) -> Iterator[tuple[str | int, ...]]:
    """Yield a row of ``HEAD`` for each class of each file; ``label`` is the number of a class."""
    for one in answers:
        found = one.prediction
        each = zip(found.labels, found.classes, found.probabilities, strict=True)
        for rank, (label, name, share) in enumerate(each, 1):
            yield one.file, rank, label, name, f"{share:.6g}"


# -- the terminal ---------------------------------------------------------------------------------


def lines(answer: Answer) -> Iterator[str]:
    """Yield the name of a file, and its classes with bars, as standard output can show them.

    On a terminal lines are not wider than it.
    """
    yield answer.file
    width = shutil.get_terminal_size().columns
    bar, found = BAR if width >= SHORT else BAR // 2, answer.prediction
    left = width - bar - len("  100.0 %    ") if sys.stdout.isatty() else None
    for name, share in zip(found.classes, found.probabilities, strict=True):
        yield f"  {100 * share:5.1f} %  {_bar(share, bar):{bar}}  {shortened(name, left)}".rstrip()


def _bar(share: float, width: int) -> str:
    try:
        EIGHTHS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(share * width)
    whole, rest = divmod(round(8 * share * width), 8)
    return (EIGHTHS[-1] * whole + EIGHTHS[rest]).rstrip()


def shortened(text: str, width: int | None) -> str:
    """Return ``text``, cut to ``width`` columns of a terminal; some characters need two."""
    if width is None or disp_len(text) <= width:
        return text
    return f"{disp_trim(text, max(0, width - 3))}..."


# -- the page -------------------------------------------------------------------------------------


def page(settings: PredictSettings, prepared: Prepared, answers: Sequence[Answer]) -> str:
    """Return a page with the picture, the classes and the neighbours of each file."""
    trained, names = prepared.trained, prepared.trained.names
    known = f"{len(names):,} classes"
    if len(names) <= NAMED:
        known += ": " + ", ".join(names)
    views = "the central view" if settings.views == 1 else f"{settings.views} views"
    about = f"{trained.path}, step {trained.step:,}, {views}. The net knows only {known}."
    cards = [_card(one, prepared, settings) for one in answers]
    body = f"<h1>Predictions</h1><p>{escape(about)}</p><main>{''.join(cards)}</main>"
    return html.page("modelpar: predictions", STYLE, body)


def _card(answer: Answer, prepared: Prepared, settings: PredictSettings) -> str:
    side = max(PICTURE, prepared.statistics.mean.shape[-1])
    with Image.open(answer.file) as opened:
        picture = _picture(square(opened, side), answer.file)
    found = answer.prediction
    bars = "".join(
        f'<li style="--share: {100 * share:.1f}%"><span>{html.breakable(name)}</span>'
        f"<span>{100 * share:.1f} %</span></li>"
        for name, share in zip(found.classes, found.probabilities, strict=True)
    )
    return (
        f"<article>{picture}<h2>{html.breakable(answer.file)}</h2><ol>{bars}</ol>"
        f"{_neighbours(answer, prepared, settings)}</article>"
    )


def _neighbours(answer: Answer, prepared: Prepared, settings: PredictSettings) -> str:
    if not answer.nearest or prepared.searched is None:
        return ""
    searched = min(settings.training_images, len(prepared.searched.train))
    figures = "".join(
        f"<figure>{_picture(pixels, prepared.trained.names[label])}<figcaption>"
        f"{html.breakable(prepared.trained.names[label])}<br>{distance:.3g}</figcaption></figure>"
        for pixels, label, distance in answer.nearest
    )
    return (
        f"<p>The nearest of {searched:,} training images, by the units of the last hidden layer, "
        f"with their classes and distances:</p><div>{figures}</div>"
    )


def _picture(pixels: Tensor, name: str) -> str:
    file = io.BytesIO()
    to_pil_image(pixels).save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{content}">'
