"""`model.fused.adapted` for CUDA, in Triton (Tillet, Kung & Cox 2019).

A program computes a tile of y. It reads the tiles of x once for both products, x Wᵀ and x Aᵀ, and
ends with h Bᵀ added in the same fp32 accumulator. Programs of one row of tiles each make h for
themselves, which costs r/BN of the arithmetic; the first of them writes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adapted(
    X, W, BIAS, A, B, S, MIX, Y, H, rows, width, out, rank, per_sample,
    x_row, x_col, w_row, w_col, a_row, a_col, b_row, b_col, s_row,
    BIASED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(out, BN)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    m = i.to(tl.int64) * BM + tl.arange(0, BM)  # int64: tensors above 2³¹ numbers
    n, r, k = j * BN + tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, BK)
    m_in, n_in, r_in = m[:, None] < rows, n[None, :] < out, r[None, :] < rank
    x_at = X + m[:, None] * x_row + k[None, :] * x_col  # (BM, BK)
    w_at = W + n[None, :] * w_row + k[:, None] * w_col  # (BK, BN), of Wᵀ
    a_at = A + r[None, :] * a_row + k[:, None] * a_col  # (BK, BR), of Aᵀ
    y = tl.zeros((BM, BN), tl.float32)
    h = tl.zeros((BM, BR), tl.float32)
    for done in range(0, width, BK):
        if EVEN:
            x = tl.load(x_at, mask=m_in, other=0.0)
            w = tl.load(w_at, mask=n_in, other=0.0)
            a = tl.load(a_at, mask=r_in, other=0.0)
        else:
            k_in = k < width - done
            x = tl.load(x_at, mask=m_in & k_in[None, :], other=0.0)
            w = tl.load(w_at, mask=n_in & k_in[:, None], other=0.0)
            a = tl.load(a_at, mask=r_in & k_in[:, None], other=0.0)
        y = tl.dot(x, w, y)
        h = tl.dot(x, a, h)
        x_at += BK * x_col
        w_at += BK * w_col
        a_at += BK * a_col
    s = tl.load(S + (m // per_sample) * s_row, mask=m < rows, other=0.0)
    mix = tl.load(MIX + r, mask=r < rank, other=0.0)
    scaled = (h * (s[:, None] * mix[None, :])).to(X.dtype.element_ty)
    b = tl.load(
        B + n[None, :] * b_row + r[:, None] * b_col, mask=n_in & (r[:, None] < rank), other=0.0
    )
    y = tl.dot(scaled, b, y)
    if BIASED:
        y += tl.load(BIAS + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + m[:, None] * out + n[None, :], y.to(X.dtype.element_ty), mask=m_in & n_in)
    if j == 0:
        tl.store(H + m[:, None] * rank + r[None, :], scaled, mask=m_in & r_in)


def launch(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """`adapted`, with tensors of one half precision, s and mix apart."""
    (out, width), rank = W.shape, A.shape[0]
    y, h = x.new_empty(*x.shape[:-1], out), x.new_empty(*x.shape[:-1], rank)
    per_sample = x[0, ..., 0].numel()
    x = x.reshape(-1, width)
    rows = x.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    BM, BN, BK, warps, stages = tiles(rows, out, processors)
    with torch.cuda.device(x.device):
        _adapted[triton.cdiv(rows, BM) * triton.cdiv(out, BN),](
            x, W, bias, A, B, s, mix, y, h, rows, width, out, rank, per_sample,
            *x.stride(), *W.stride(), *A.stride(), *B.stride(), s.stride(0) * (s.shape[0] > 1),
            BIASED=bias is not None, EVEN=width % BK == 0,
            BM=BM, BN=BN, BK=BK, BR=max(16, triton.next_power_of_2(rank)),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y, h


def tiles(rows: int, out: int, processors: int) -> tuple[int, int, int, int, int]:
    """(BM, BN, BK, warps, stages): large tiles where they occupy the GPU, otherwise small ones.

    Of eleven, the quickest or within 3 % of it at SD1.5's shapes on an H200 (experiments/LOG.md).
    Compiled for compute capability 8.0 to 12.0 they spill no registers, and at rank 64 take 80 KiB
    of shared memory where there are 99, and 120 on 9.0 and 10.0.
    """
    if triton.cdiv(rows, 128) * triton.cdiv(out, 128) < processors:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 3
