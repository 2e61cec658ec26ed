"""model/detail.py: what the autoencoder and shrinking lose of an image, given back to its edit."""

import numpy as np
import pytest
import torch

from model import detail
from model.detail import at_strengths, enlarged, keep_detail, local_map, resized


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_detail_is_kept_where_nothing_changes():
    """ẑ = z gives the image itself; where it changes by far, the decoder's picture is untouched;
    in between, the weight is that of the formula."""
    g = torch.Generator().manual_seed(0)
    before = torch.rand((1, 3, 8, 8), generator=g) * 2 - 1
    seen = 0.5 * before  # an autoencoder that loses half
    torch.testing.assert_close(keep_detail(before, seen, seen), before)
    changed = seen.clone()
    changed[:, 0, :4] += 2.0
    changed[:, 1, 6] += 0.1
    result = keep_detail(before, seen, changed)
    torch.testing.assert_close(result[:, :, :4], changed[:, :, :4])
    torch.testing.assert_close(result[:, :, 4:6], before[:, :, 4:6])
    weight = torch.tensor(-0.25).exp()
    expected = changed[:, :, 6] + weight * (before - seen)[:, :, 6]
    torch.testing.assert_close(result[:, :, 6], expected)


def test_the_map_of_colours_is_a_ridge_regression_in_each_window():
    """Each window's by the normal equations in float64, w by its residual, then their mean."""
    y, y_hat = noise(1, 3, 9, 7).double(), noise(1, 3, 9, 7, seed=1).double()
    y_hat = 0.5 * y_hat + torch.einsum("ij,bjhw->bihw", noise(3, 3, seed=2).double(), y)
    r, ridge = detail.RADIUS, detail.RIDGE * np.eye(3)

    def window(image, i, j):
        part = image[0, :, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1].reshape(3, -1)
        part = part.numpy()
        return part - part.mean(1, keepdims=True)

    maps = np.empty((9, 7, 3, 3))
    for i in range(9):
        for j in range(7):
            a, b = window(y, i, j), window(y_hat, i, j)
            n = a.shape[1]
            m = (b @ a.T / n + ridge) @ np.linalg.inv(a @ a.T / n + ridge)
            rest, whole = ((b - m @ a) ** 2).sum() / n, (b**2).sum() / n
            maps[i, j] = m * np.clip(1 - rest / (whole + detail.RIDGE), 0, 1)
    expected = [maps[max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1].mean((0, 1))
                for i in range(9) for j in range(7)]  # fmt: skip
    found = local_map(y, y_hat)[0].permute(2, 3, 0, 1).reshape(-1, 3, 3).numpy()
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(60, 44), (11, 9)], ids=["larger", "smaller"])
def test_an_unchanged_image_comes_back_as_it_was(size):
    x = noise(2, 3, *size)
    small = resized(x, (15, 11))
    torch.testing.assert_close(enlarged(small, small, x), x)
    flat = torch.full_like(small, 0.3)  # nothing to fit a map to
    torch.testing.assert_close(enlarged(flat, flat, x), x - resized(flat, size) + 0.3)
    assert enlarged(x, 0 * x, x) is x  # an edit at the image's own size is the result


def test_detail_is_recoloured_like_what_is_around_it():
    """Darkened and tinted: the texture that shrinking lost comes back fainter and tinted."""
    x = noise(1, 3, 128, 128)
    tint = torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.4, 0.0], [0.1, 0.0, 0.7]])
    y = torch.einsum("ij,bjhw->bihw", tint, x) + 0.1
    small, edited = resized(x, (32, 32)), resized(y, (32, 32))
    error = lambda image: (image - y).square().mean().item()  # noqa: E731
    blurred = resized(edited, (128, 128), "bicubic")
    pasted = blurred + x - resized(small, (128, 128), "bicubic")
    assert error(enlarged(edited, small, x)) < 0.02 * min(error(blurred), error(pasted))


def test_what_was_replaced_does_not_show_through():
    """A texture that explains nothing of what stands there now."""
    x, new = noise(1, 3, 128, 128), resized(noise(1, 3, 32, 32, seed=1), (128, 128), "bicubic")
    small, edited = resized(x, (32, 32)), resized(new, (32, 32))
    lost = x - resized(small, (128, 128), "bicubic")
    left = enlarged(edited, small, x) - resized(edited, (128, 128), "bicubic")
    assert left.square().mean() < 0.05 * lost.square().mean()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("fade", [True, False])
def test_strengths_of_a_shrunk_image(fade, keep):
    """Strength 0 is the image; a fade is a line at the image's own size; without detail, the
    decoder's picture is enlarged."""
    x, z = noise(1, 3, 24, 20), noise(1, 3, 12, 10, seed=1)
    decode = lambda z: 0.9 * z  # noqa: E731
    edit = lambda s: z * (1 - s / 2)  # noqa: E731
    strengths = [0.0, 0.5, 1.0, 1.5]
    found = at_strengths(decode, x, z, strengths, edit, fade=fade, detail=keep)
    grown = lambda image: resized(image, (24, 20), "bicubic")  # noqa: E731
    before = x if keep else grown(decode(z))
    torch.testing.assert_close(found[0], before)

    def alone(s):
        if not keep:
            return grown(decode(edit(s)))
        small = resized(x, (12, 10))
        return enlarged(keep_detail(small, decode(z), decode(edit(s))), small, x)

    expected = [before + s * (alone(1) - before) if fade else alone(s) for s in strengths[1:]]
    for one, other in zip(found[1:], expected):
        torch.testing.assert_close(one, other)
