"""What TensorBoard shows beside scalars: histograms, pictures with names, distances of units."""

import pytest
import torch

from modelpar.analysis.histograms import BINS, SAMPLE, gathered, sample
from modelpar.analysis.pictures import CELL, TEXT, TILE, confusion_picture, labelled_grid
from modelpar.distributed import Mesh
from modelpar.training.showing import points

ALONE = Mesh(torch.device("cpu"))


def test_a_sample_is_a_copy_that_visits_all_columns_of_a_matrix() -> None:
    values = torch.arange(2048 * 64).view(2048, 64).bfloat16()
    found = sample(torch.arange(2048 * 64).view(2048, 64))
    assert SAMPLE / 2 <= len(found) <= 2 * SAMPLE
    assert len(set((found % 64).tolist())) == 64
    assert sample(values[:4]).dtype == torch.float32
    few = torch.ones(3)
    sample(few).zero_()
    assert few.sum() == 3


def test_histograms_count_finite_values() -> None:
    values = torch.linspace(-1, 3, 801)
    odd = torch.tensor([torch.nan, torch.inf])
    samples = {"conv1": [torch.cat([values, odd]), odd], "conv2": [torch.zeros(5), values]}
    found = {(one.name, one.column): one for one in gathered(samples, 2, ALONE)}
    assert set(found) == {("conv1", 0), ("conv2", 0), ("conv2", 1)}  # the other one is empty
    one = found["conv1", 0]
    assert (one.least, one.most, len(one.counts), sum(one.counts)) == (-1, 3, BINS, 801)
    assert all(19 <= count <= 22 for count in one.counts)
    assert one.total == pytest.approx(float(values.sum()))
    assert one.squares == pytest.approx(float(values.square().sum()))
    zeros = found["conv2", 0]
    assert zeros.least < 0 < zeros.most
    assert max(zeros.counts) == sum(zeros.counts) == 5


def test_points_are_as_far_apart_as_the_units() -> None:
    units = torch.randn(12, 40, dtype=torch.float64) + 5
    units[3] = units[4]
    parts = [half @ half.T for half in units.chunk(2, 1)]  # of each column
    found = points(parts[0] + parts[1])
    assert found.shape[1] <= 11
    assert torch.allclose(torch.cdist(found, found), torch.cdist(units, units).float(), atol=1e-4)
    spread = found.var(0)
    assert torch.equal(spread, spread.sort(descending=True).values)


def test_each_image_of_a_batch_has_its_name_below() -> None:
    images = torch.full((5, 3, 224, 224), 0.5)
    names = ["brick", "moon", "immunohistochemistry and more", "", "café"]
    grid = labelled_grid(images, names)
    assert grid.shape == (3, 2 * (TILE + TEXT + 8), 4 * (TILE + 4))
    below = grid[0, TILE : TILE + TEXT + 8].chunk(4, 1)
    assert [bool((part < 128).any()) for part in below] == [True, True, True, False]
    assert not (below[2][:, -3:] < 255).any()  # cut before the next image
    assert torch.equal(grid[:, TILE // 2, 10], torch.tensor([127] * 3))


def test_wrong_answers_are_red_cells_in_the_row_of_their_class() -> None:
    counts = torch.tensor([[9, 0, 1], [0, 0, 0], [4, 0, 6]])
    picture = confusion_picture(counts, ["brick", "moon", "rocket"]).float()
    corner = picture.shape[2] - 4 - 3 * CELL  # of the first cell

    def colour(row: int, column: int) -> list[float]:
        top, left = CELL * (row + 1), corner + CELL * column
        return picture[:, top + 2, left + 2].tolist()  # beside the number

    red, _, blue = colour(0, 0)
    assert blue > red + 50
    red, _, blue = colour(2, 0)
    assert red > blue + 50
    assert colour(1, 1) == colour(0, 1) == [255.0] * 3
    assert confusion_picture(torch.eye(300), [""] * 300).shape == (3, 900, 900)
