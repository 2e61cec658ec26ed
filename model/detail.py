"""From edited latents to pictures of the image's own size, with the detail that it had.

at_strengths    the pictures of an edit
keep_detail     gives back what the autoencoder loses, where nothing changes
enlarged        gives back what shrinking loses, as the change alters it
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 0.2  # of 2: a change this large keeps a third of the detail that the autoencoder loses
RADIUS, RIDGE = 2, 1e-3  # of `local_map`: LOG.md, "The detail of a large image"


def at_strengths(
    decode: Callable[[Tensor], Tensor],
    pixels: Tensor,
    z: Tensor,
    strengths: Sequence[float],
    edit: Callable[[float], Tensor],
    *,
    fade: bool,
    detail: bool = True,
) -> list[Tensor]:
    """pixels (b, 3, H, W), with latents z, edited at each strength: a list of (b, 3, H, W).

    `edit(s)` gives the latents at strength s, `decode` an image, which may be smaller than `pixels`
    or larger. With `fade`, all strengths lie on the line from the image to its edit at 1, and
    beyond: a LoRA trained on before and after only cannot know the order of changes, and was never
    trained at other multipliers.
    """
    seen, size = decode(z), pixels.shape[2:]
    small = resized(pixels, seen.shape[2:])  # as the networks see it
    before = pixels if detail else resized(seen, size, "bicubic")

    def edited(s: float) -> Tensor:
        changed = decode(edit(s))
        if not detail:
            return resized(changed, size, "bicubic")
        return enlarged(keep_detail(small, seen, changed), small, pixels)

    whole = edited(1.0) if fade and any(strengths) else before

    def at(s: float) -> Tensor:
        if s == 0:  # exactly unchanged, although a multi-step path would regenerate the image
            return before
        return torch.lerp(before, whole, s) if fade else edited(s)

    return [at(s) for s in strengths]


def resized(pixels: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """pixels (b, 3, H, W) at another size; antialiased, like the training images."""
    if pixels.shape[2:] == torch.Size(size):
        return pixels
    return F.interpolate(pixels, tuple(size), mode=mode, antialias=True)


def keep_detail(before: Tensor, seen: Tensor, changed: Tensor) -> Tensor:
    """`changed` plus the detail of the before image that the autoencoder loses, where unchanged.

        x̂ = Dec(ẑ) + w (x − Dec(z)),   w = exp(−(|Dec(ẑ) − Dec(z)| / REACH)²) at every pixel

    before x, seen Dec(z), changed Dec(ẑ): (b, 3, H, W) in [-1, 1]; |.| is the largest of the three
    channels. With ẑ = z the result is the before image itself. It neither adds nor removes change.
    """
    change = (changed - seen).abs().amax(1, keepdim=True)  # (b, 1, H, W)
    return changed + torch.exp(-((change / REACH) ** 2)) * (before - seen)


def enlarged(edited: Tensor, small: Tensor, pixels: Tensor) -> Tensor:
    """An edit of a shrunk image, at the image's own size, with the image's own detail:

        x̂ = ↑ŷ + A (x − ↑y),   A ≈ ∂ŷ/∂y, the `local_map`

    edited ŷ and small y, (b, 3, h, w); pixels x, (b, 3, H, W). What the change recolours keeps its
    texture, recoloured; what it replaces does not show through. With ŷ = y the result is x. As in
    the fast guided filter (He & Sun 2015, arXiv 1505.00996) the map is fitted to the small images.
    """
    if edited.shape == pixels.shape:
        return edited
    size = pixels.shape[2:]
    found = resized(edited, size, "bicubic")
    lost = pixels - resized(small, size, "bicubic")
    for colour, row in enumerate(local_map(small, edited).unbind(1)):  # one at a time, for memory
        found[:, colour] += (F.interpolate(row, size, mode="bilinear") * lost).sum(1)
    return found


def local_map(y: Tensor, y_hat: Tensor) -> Tensor:
    """How colours around each pixel go from y to ŷ, (b, 3, h, w) each: (b, 3, 3, h, w), by row.

        A = w (Cov(ŷ, y) + ε) (Cov(y, y) + ε)⁻¹,   w: the share of the variance of ŷ it explains

    over windows of 5 x 5 pixels, averaged over the windows that hold a pixel: a guided filter (He,
    Sun & Tang 2013, "Guided Image Filtering", eq. 11 and 14 in colour), but that its ridge ε draws
    A to the identity, so that flat places keep what they had.
    """
    ridge = RIDGE * torch.eye(3).to(y)
    c_yy = covariance(y, y)  # (b, h, w, 3, 3)
    c_hy, c_hh = covariance(y_hat, y), covariance(y_hat, y_hat)
    a = torch.linalg.solve(c_yy + ridge, c_hy + ridge, left=False)
    # the variance of ŷ − A y, in all channels together
    rest = c_hh - 2 * a @ c_hy.mT + a @ c_yy @ a.mT
    trace = lambda c: c.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    explained = (1 - trace(rest) / (trace(c_hh) + RIDGE)).clamp(0, 1)  # (b, h, w)
    a = (explained[..., None, None] * a).permute(0, 3, 4, 1, 2)  # (b, 3, 3, h, w)
    return window_mean(a.flatten(1, 2)).unflatten(1, (3, 3))


def covariance(x: Tensor, y: Tensor) -> Tensor:
    """Of the channels of two images (b, 3, h, w) in each pixel's window: (b, h, w, 3, 3)."""
    products = lambda x, y: (x[:, :, None] * y[:, None]).flatten(1, 2)  # noqa: E731, (b, 9, h, w)
    found = window_mean(products(x, y)) - products(window_mean(x), window_mean(y))
    return found.unflatten(1, (3, 3)).permute(0, 3, 4, 1, 2)


def window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2 * RADIUS + 1, 1, RADIUS, count_include_pad=False)
