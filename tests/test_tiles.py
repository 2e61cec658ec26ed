"""Windows over a large image: what they cover, how answers are blended, what the networks see."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.tiles import Tiles, starts, through, windowed


@given(st.integers(1, 400), st.integers(1, 64), st.data())
def test_windows_cover_all_in_even_steps_and_share_what_was_asked(length, side, data):
    overlap = data.draw(st.integers(0, side - 1))
    found = starts(length, Tiles(side, overlap))
    assert found[0] == 0
    assert found[-1] == max(length - side, 0)  # none begins outside, the last ends at the end
    steps = [b - a for a, b in pairwise(found)]
    assert all(0 < step <= side - overlap for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    assert len(found) == 1 or (len(found) - 2) * (side - overlap) + side < length  # none too many


@pytest.mark.parametrize("shape", [(2, 3, 21, 35), (1, 3, 8, 40), (3, 3, 40, 5)])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_what_looks_at_one_pixel_is_in_windows_what_it_is_as_a_whole(shape, overlap):
    x = torch.randn(shape, dtype=torch.float64)
    found = through(lambda x: 3 * x + 1, x, Tiles(8, overlap, batch=4))
    torch.testing.assert_close(found, 3 * x + 1)


def test_where_windows_meet_one_answer_fades_into_the_other():
    """Of a network that counts its windows: 0 in the first, 1 in the second, in between a slope."""
    asked = []

    def count(x):
        asked.append(len(asked))
        return torch.full_like(x, asked[-1])

    found = through(count, torch.zeros(1, 1, 1, 12, dtype=torch.float64), Tiles(8, 4))[0, 0, 0]
    assert asked == [0, 1]
    torch.testing.assert_close(found[:4], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found[8:], torch.ones(4, dtype=torch.float64))
    slope = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    torch.testing.assert_close(found[4:8], slope)


def test_pixels_of_latents_and_latents_of_pixels():
    x = torch.randn(1, 2, 20, 28, dtype=torch.float64)
    tiles = Tiles(6, 2)
    coded = through(lambda x: F.avg_pool2d(x, 2), x, tiles, takes=2)
    torch.testing.assert_close(coded, F.avg_pool2d(x, 2))
    double = lambda x: F.interpolate(x, scale_factor=2.0)  # noqa: E731
    torch.testing.assert_close(through(double, coded, tiles, gives=2), double(coded))


def test_no_more_windows_at_a_time_than_asked_and_never_a_larger_one():
    shapes = []

    def seen(x):
        shapes.append(tuple(x.shape))
        return x

    through(seen, torch.zeros(2, 4, 20, 8), Tiles(8, 2, batch=5))  # 3 windows of 2 images
    assert shapes == [(4, 4, 8, 8), (2, 4, 8, 8)]
    shapes.clear()
    through(seen, torch.zeros(6, 4, 20, 6), Tiles(8, 2, batch=5))  # more images than that
    assert shapes == [(6, 4, 8, 6)] * 3


def test_one_window_is_the_whole_image_to_the_bit():
    x, conv = torch.randn(1, 3, 8, 7), torch.nn.Conv2d(3, 3, 3, padding=1)
    assert through(conv, x, Tiles(8, 2)).equal(conv(x))


@pytest.mark.parametrize("m", [None, torch.tensor([0.5, -2.0])])
def test_each_window_is_told_its_own_images_step_and_strength(m):
    def predict(x_t, t, m):
        said = x_t * t.view(-1, 1, 1, 1)
        return said if m is None else said + m.view(-1, 1, 1, 1)

    x, t = torch.randn(2, 4, 19, 11, dtype=torch.float64), torch.tensor([3, 700])
    torch.testing.assert_close(windowed(predict, Tiles(8, 2, 6))(x, t, m), predict(x, t, m))
    assert windowed(predict, None) is predict


def test_windows_that_share_enough_hide_where_they_end():
    """Of a convolution, whose answers are wrong at a window's ends: the larger the share, the less
    of that is left."""
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 5, 5)
    f = lambda x: F.conv2d(x, kernel, padding=2)  # noqa: E731
    off = [(through(f, x, Tiles(16, o)) - f(x)).square().mean().item() for o in (0, 4, 8)]
    assert off[0] > 2 * off[1] > 4 * off[2]
