"""Figure 3 in numbers: kernels whose colour share and frequency are known."""

import math

import pytest
import torch

from modelpar.analysis.kernels import (
    COLOUR_SHARE,
    RANDOM_SHARE,
    colour_difference,
    colour_share,
    frequency,
    specialisation,
)


def grating(waves: int, angle: str = "across") -> torch.Tensor:
    """Return (11, 11): a cosine with ``waves`` periods across the kernel."""
    wave = torch.cos(2 * math.pi * waves * torch.arange(11) / 11)
    if angle == "across":
        return wave.expand(11, 11)
    return torch.cos(2 * math.pi * waves * (torch.arange(11)[:, None] + torch.arange(11)) / 11)


def coloured(pattern: torch.Tensor, red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue])[None, :, None, None] * pattern


@pytest.mark.parametrize("waves", [1, 2, 5])
def test_grey_grating_has_no_colour_and_its_frequency(waves: int) -> None:
    kernels = coloured(grating(waves), 1, 1, 1)
    assert float(colour_share(kernels)) == pytest.approx(0, abs=1e-9)
    assert float(frequency(kernels)) == pytest.approx(waves / 11, abs=1e-6)
    slanted = coloured(grating(waves, "slanted"), 1, 1, 1)
    assert float(frequency(slanted)) == pytest.approx(math.sqrt(2) * waves / 11, abs=1e-6)


def test_red_minus_green_is_all_colour() -> None:
    blob = coloured(torch.ones(11, 11), 1, -1, 0)
    assert float(colour_share(blob)) == pytest.approx(1)
    assert float(frequency(blob)) == pytest.approx(0, abs=1e-9)  # the constant part counts
    red = coloured(grating(2), 1, 0, 0)
    assert float(colour_share(red)) == pytest.approx(2 / 3)


def test_random_weights_have_the_documented_shares() -> None:
    kernels = 0.01 * torch.randn(2000, 3, 11, 11)
    share = colour_share(kernels)
    assert float(share.mean()) == pytest.approx(RANDOM_SHARE, abs=0.005)
    assert float(share.std()) == pytest.approx(0.035, abs=0.003)  # the comment at COLOUR_SHARE
    assert float((share > COLOUR_SHARE).double().mean()) < 0.02
    assert float(frequency(kernels).mean()) == pytest.approx(0.38, abs=0.005)


def test_kernel_of_zeros_has_no_colour_and_no_frequency() -> None:
    assert float(colour_share(torch.zeros(1, 3, 11, 11))) == 0
    assert float(frequency(torch.zeros(1, 3, 11, 11))) == 0


def test_grey_and_colour_columns_differ() -> None:
    grey = coloured(grating(3), 1, 1, 1).repeat(48, 1, 1, 1)
    colour = coloured(torch.ones(11, 11), 1, 0, -1).repeat(48, 1, 1, 1)
    found = specialisation(torch.cat([grey, colour]), columns=2)
    assert [part.colour_kernels for part in found] == [0, 48]
    assert colour_difference(found) == pytest.approx(-1, abs=1e-6)
    mixed = specialisation(torch.cat([grey, colour, colour, colour]), columns=2)
    assert colour_difference(mixed) == pytest.approx(-0.5, abs=1e-6)


def test_one_column_has_no_difference() -> None:
    (only,) = specialisation(torch.randn(64, 3, 5, 5), columns=1)
    assert len(only.colour_share) == 64
    assert colour_difference([only]) is None
