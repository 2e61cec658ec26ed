"""From an objective's error map to a scalar loss: change masks, and preservation outside them."""

import torch
from torch import Tensor

from model.objectives import Draws, Predict, Task, noise_loss


def pair_loss(
    task: Task,
    predict: Predict,
    z: Tensor,
    s: Tensor,
    draws: Draws,
    mask: Tensor | None,
    *,
    outside: float,
    preserve: float,
) -> tuple[Tensor, Tensor]:
    """The loss, (), and the error map, (n, 4, h, w), of latents z (b, f, 4, h, w) at strengths s.

    `outside`: the error's weight outside the mask (b, 1, h, w); `preserve`: the weight of
    `preservation` there.
    """
    ask, heard = listened(predict) if preserve else (predict, [])
    error = task.objective.loss(ask, task.schedule, z[:, 0], z[:, -1], s, draws, task.knobs)
    loss = weighted_mean(error, mask, outside)
    if heard:
        loss = loss + preserve * preservation(predict, heard, mask)
    return loss, error


def prior_loss(task: Task, predict: Predict, z: Tensor, draws: Draws) -> Tensor:
    """Prior preservation, (): the noise loss of class images z (b, 1, 4, h, w) at multiplier 1.

    Ruiz et al. 2022 (arXiv 2208.12242), section 3.3.
    """
    ones = torch.ones(len(z), device=z.device)
    return noise_loss(predict, task.schedule, z[:, 0], ones, draws, task.knobs).mean()


def weighted_mean(error: Tensor, mask: Tensor | None, outside: float) -> Tensor:
    """The mean of error (n, 4, h, w), where n is a multiple of the mask's b.

    With a mask (b, 1, h, w): weight 1 inside, `outside` elsewhere. Each sample is normalized by its
    total weight, so that small masks count as much as large ones.
    """
    if mask is None:
        return error.mean()
    w = outside + (1 - outside) * mask.repeat(len(error) // len(mask), 1, 1, 1)
    per_sample = (w * error).mean(dim=(1, 2, 3)) / w.mean(dim=(1, 2, 3)).clamp(min=1e-6)  # (n,)
    return per_sample.mean()


def in_and_out(error: Tensor, mask: Tensor | None) -> Tensor:
    """(3,): the contributions to the mean error from inside and outside the mask; the coverage.

    Contribution / coverage is the mean error inside. This also holds for averages of both over
    micro-batches and processes, even if some have no pixel inside. error: (n, 4, h, w).
    """
    if mask is None:
        return error.new_zeros(3)
    w = mask.repeat(len(error) // len(mask), 1, 1, 1)  # (n, 1, h, w)
    by_place = error.mean(1, keepdim=True)
    return torch.stack([(w * by_place).mean(), ((1 - w) * by_place).mean(), w.mean()])


def listened(predict: Predict) -> tuple[Predict, list]:
    """`predict`, and a list that records (x_t, t, output) of its calls with the LoRA active."""
    heard = []

    def listening(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        answer = predict(x_t, t, m)
        if m is not None:
            heard.append((x_t, t, answer))
        return answer

    return listening, heard


def preservation(predict: Predict, heard: list, mask: Tensor) -> Tensor:
    """‖e_s(x_t) − e_0(x_t)‖² outside the mask (b, 1, h, w), over all recorded calls."""
    terms = []
    for x_t, t, e_s in heard:
        with torch.no_grad():
            e_0 = predict(x_t, t, None)
        squares = (e_s - e_0)[..., -mask.shape[3] :] ** 2  # (n, 4, h, w); right half of a canvas
        terms.append(weighted_mean(squares, 1 - mask, 0.0))
    return torch.stack(terms).mean()
