"""Pictures with names: a batch of images, and a confusion matrix."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

TILE: Final = 128  # pixels, the side of an image in a grid
PER_ROW: Final = 4  # images in a grid
TEXT: Final = 18  # pixels: TensorBoard shows a picture smaller than it is
CELL: Final = 28  # pixels, the side of a class with its name
NAMED: Final = 40  # classes; more have no names
LONGEST: Final = 200  # pixels of a name
WHITE: Final = (255, 255, 255)
BLACK: Final = (0, 0, 0)


def _fitting(name: str, font: Any, width: int) -> str:
    """Return as much of ``name`` as fits into ``width`` pixels."""
    while font.getlength(name) > width:
        name = name[:-1]
    return name


def labelled_grid(images: Tensor, names: Sequence[str]) -> Tensor:
    """Return images (N, 3, S, S) in 0..1, each above its name, as one picture (3, H, W) uint8."""
    font, width, height = ImageFont.load_default(TEXT), TILE + 4, TILE + TEXT + 8
    rows = -(-len(images) // PER_ROW)
    picture = Image.new("RGB", (PER_ROW * width, rows * height), WHITE)
    draw = ImageDraw.Draw(picture)
    pixels = (images.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for place, (image, name) in enumerate(zip(pixels, names, strict=True)):
        top, left = place // PER_ROW * height, place % PER_ROW * width
        picture.paste(Image.fromarray(image).resize((TILE, TILE)), (left + 2, top))
        draw.text((left + 2, top + TILE), _fitting(name, font, TILE), BLACK, font)
    return pil_to_tensor(picture)


def confusion_picture(counts: Tensor, classes: Sequence[str]) -> Tensor:
    """Return how often images of a class (row) got an answer (column), as (3, H, W) uint8.

    ``counts`` (C, C): a cell is darker the larger its share of its row; the wrong ones are red.
    Up to ``NAMED`` classes have names, numbers and counts, more have plain cells of a few pixels.
    """
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    right = torch.eye(len(counts), dtype=torch.bool)
    light = torch.tensor([1.0, 1.0, 1.0])
    dark = torch.where(
        right[..., None], torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.8, 0.1, 0.1])
    )
    shades = light + share.sqrt()[..., None] * (dark - light)  # rare answers are seen, too
    cells = Image.fromarray((shades * 255).to(torch.uint8).numpy())
    side = CELL if len(counts) <= NAMED else max(1, 1024 // len(counts))
    cells = cells.resize([side * len(counts)] * 2, Image.Resampling.NEAREST)
    if side != CELL:
        return pil_to_tensor(cells)
    font = ImageFont.load_default(TEXT)
    names = [_fitting(f"{number} {name}", font, LONGEST) for number, name in enumerate(classes)]
    margin = int(max(font.getlength(name) for name in names)) + 8
    picture = Image.new("RGB", (margin + cells.width + 4, CELL + cells.height + 4), WHITE)
    picture.paste(cells, (margin, CELL))
    draw, small = ImageDraw.Draw(picture), ImageFont.load_default(TEXT - 4)
    for row, name in enumerate(names):
        middle = CELL * row + CELL // 2
        draw.text((margin - 6, CELL + middle), name, BLACK, font, anchor="rm")
        draw.text((margin + middle, CELL // 2), str(row), BLACK, font, anchor="mm")
        for column, count in enumerate(counts[row].tolist()):
            if count:
                ink = WHITE if share[row, column] > 0.3 else BLACK  # noqa: PLR2004 - readable
                place = (margin + CELL * column + CELL // 2, CELL + middle)
                draw.text(place, str(count), ink, small, anchor="mm")
    return pil_to_tensor(picture)
