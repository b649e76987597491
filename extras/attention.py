"""Forms of attention: what model.attention computes, faster on one device or another.

The model's own is PyTorch's fused kernel with query groups and a mask. Which form is faster is a
matter of device, dtype, rows and slots; docs/speed.md has the measurements. ``choose`` picks one
for a model, and all its layers take it. Each form takes q, k, v and mask as model.attention does.

On an NVIDIA GPU (by reading PyTorch's source; not measured yet):

* No fused kernel takes a mask together with query groups. So the heads of a group become rows of
  one head (``folded``), and the mask is repeated for them, once a pass (``FoldOnce``).
* The kernel that takes a mask lets one part of the chip walk through all slots of a head. A long
  text has few heads and rows, and would leave most of the chip idle. So its slots are cut into
  pieces that are attended to side by side (``in_pieces``).
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ALIGNED, Llama, attention, round_up

LONG_FLOAT32 = 4096           # slots from which on attention is written out, on a CPU
LONG_BFLOAT16 = 1024
LONG_CUDA = 1024              # slots from which on they are attended to in pieces
PIECE = 256                   # slots of a piece
FEW_ROWS = 32                 # long texts have forms of their own up to so many rows


def choose(model: Llama) -> Callable:
    """The fastest form for this model's device and dtype."""
    weight = model.embed.weight
    if weight.device.type == "cuda":
        return FoldOnce(partial(by_length, folded, in_pieces, LONG_CUDA))
    if weight.dtype == torch.float16:
        return FoldOnce(widened)
    if weight.dtype == torch.float32:
        return FoldOnce(partial(by_length, folded_if_several, written_out, LONG_FLOAT32))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return FoldOnce(partial(by_length, folded, written_out, LONG_BFLOAT16))
    return FoldOnce(folded)


def attend_by(model: Llama, form: Callable):
    """Let all layers take this form; and no attention of cuDNN's, in this whole process.

    PyTorch prefers cuDNN's on some GPUs, but it plans anew, for tens of milliseconds, at every new
    number of slots: at each token.
    """
    for layer in model.layers:
        layer.attend = form
    if model.embed.weight.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def by_length(
    short: Callable, long: Callable, first: int, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None
) -> Tensor:
    """``short``, or from ``first`` slots on, for a few rows, ``long``."""
    rows = q.shape[2]
    causal = mask is None and rows > 1                   # from slot 0 on: has a kernel
    if k.shape[2] < first or rows > FEW_ROWS or causal:
        return short(q, k, v, mask)
    return long(q, k, v, mask)


# ---------------------------------------------------------------------------- folded

def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """For kernels that are slow with query groups: CUDA's, which take no mask then, and bfloat16's.

    The heads of a group become rows of one head, so nothing is repeated but the mask, which may
    come so already.
    """
    if mask is None and q.shape[2] > 1:                  # causal from slot 0: has a kernel
        return attention(q, k, v, mask)
    rows = fold_rows(q, k)
    mask = fold_mask(mask, rows.shape[2])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def folded_if_several(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In float32 on a CPU folding pays from two rows on, which have a mask."""
    attend = attention if mask is None else folded
    return attend(q, k, v, mask)


def widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In float32, for which a CPU has fast kernels, and for float16 none."""
    wide = None if mask is None else mask.float()
    return folded_if_several(q.float(), k.float(), v.float(), wide).to(q.dtype)


def fold_rows(q: Tensor, k: Tensor) -> Tensor:
    """q (1, heads, rows, head_dim) -> (1, kv_heads, groups * rows, head_dim)."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def fold_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The mask (rows of one head, slots) repeated for the heads of a group: (rows, slots).

    In memory its rows have a multiple of ALIGNED numbers: CUDA's kernels would copy it else.
    """
    if mask is None or len(mask) == rows:
        return mask
    slots = mask.shape[1]
    padded = F.pad(mask, (0, round_up(slots, ALIGNED) - slots))
    return padded.repeat(rows // len(mask), 1)[:, :slots]


class FoldOnce:
    """A form that is given a folded mask. All layers of a pass have one mask: it is folded once.

    The mask is known again by its identity: one that was given may not be changed in place after
    that, unless it came folded. The two are kept as one pair, since several threads may decode with
    one model.
    """

    def __init__(self, form: Callable):
        self.form = form
        self.last = (None, None)                         # a mask, and the same folded

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self.form(q, k, v, None)
        given, its_fold = self.last
        if mask is not given:
            its_fold = fold_mask(mask, fold_rows(q, k).shape[2])
            self.last = (mask, its_fold)
        return self.form(q, k, v, its_fold)


# ---------------------------------------------------------------------------- many slots

def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Folded and written out, for many slots on a CPU: oneDNN's products read them fastest.

    With r = groups * rows: scores (kv_heads, r, slots) = (k q^T)^T / sqrt(head_dim) + mask.
    """
    rows = fold_rows(q, k)[0] * q.shape[3] ** -0.5       # (kv_heads, r, head_dim)
    scores = by_transposed(k[0], rows).transpose(1, 2).contiguous()
    if mask is not None:
        scores.add_(fold_mask(mask, rows.shape[1]))
    return by_transposed(scores.softmax(-1), v[0].transpose(1, 2)).reshape(q.shape)


def by_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for each head. a (heads, m, n), b (heads, k, n) -> (heads, m, k)."""
    if a.dtype != torch.float32:
        return torch.bmm(a, b.transpose(1, 2))           # by oneDNN
    multiply = torch.ops.mkldnn._linear_pointwise        # torch.bmm would take MKL
    return torch.stack([multiply(x, y, None, "none", [], "") for x, y in zip(a, b)])


def in_pieces(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Folded, with the slots in pieces of equal size that are attended to side by side.

    With o_b what piece b alone would give, and l_b the logarithm of its sum of exponentials,

        softmax(scores) v  =  sum_b w_b o_b,     w = softmax of l over the pieces

    A piece's size is fixed, so a row's bits do not depend on how many rows there are.
    """
    if mask is None:
        return folded(q, k, v, None)                     # has a kernel that cuts the slots itself
    rows = fold_rows(q, k)
    # A piece may be masked as a whole, and of only -inf no kernel makes a number.
    mask = fold_mask(mask, rows.shape[2]).clamp(min=torch.finfo(mask.dtype).min)
    whole = k.shape[2] // PIECE * PIECE
    parts = [attend_and_sum(rows, *(pieces_of(x, whole) for x in (k, v)), mask_of(mask, whole))]
    if whole < k.shape[2]:
        rest = slice(whole, None)
        parts.append(attend_and_sum(rows, k[:, :, rest], v[:, :, rest], mask[:, rest]))
    outs, sums = (torch.cat(both) for both in zip(*parts))          # by piece
    weights = sums.softmax(0)[..., None]
    return (weights * outs).sum(0).to(q.dtype).reshape(q.shape)


def pieces_of(x: Tensor, whole: int) -> Tensor:
    """Keys or values (1, kv_heads, slots, head_dim) -> (pieces, kv_heads, PIECE, head_dim)."""
    return x[0, :, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)


def mask_of(mask: Tensor, whole: int) -> Tensor:
    """mask (rows, slots) -> (pieces, 1, rows, PIECE)."""
    return mask[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)[:, None]


def attend_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention for each piece, and the logarithm of each row's sum of exponentials, in float32.

    q (1, kv_heads, r, head_dim) for all; k, v (pieces, kv_heads, slots, head_dim) ->
    (pieces, kv_heads, r, head_dim) and (pieces, kv_heads, r).
    """
    pieces, kv_heads, slots, _ = k.shape
    rows = q.shape[2]
    q = q.expand(pieces, -1, -1, -1)
    mask = mask.expand(pieces, kv_heads, rows, slots)
    if q.device.type == "cuda":
        out, sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, compute_log_sumexp=True)
    else:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask)
    return out.float(), sums[..., :rows]                 # CUDA's are padded
