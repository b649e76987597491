"""Weights in eight bits: half the memory of 16, and half the bytes to read for a token.

Decoding one text reads every weight once for each token, and does little with it. So the fewer
bytes a weight has, the faster. Each row of a matrix has one scale, and is kept as whole numbers:

    scale[r] = max |W[r]| / 127          code[r, c] = round(W[r, c] / scale[r]), in -127 .. 127

    x W^T  ~  (x code^T) * scale

Codes and scales are all that is approximate; x is not rounded, sums are float32. Drafts and checks
are made by the same weights, so decoding stays lossless: the text is that of the eight-bit model's
own plain decoding. The embedding stays as it is; the head has eight bits, beside it where they are
tied.

``plain_product`` says what is computed. It widens the codes first, which takes longer than 16-bit
weights would. For a few rows a CPU has a kernel for bfloat16, and an NVIDIA GPU has int8_cuda.py's.
Their rows do not depend on each other.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.packed import require_numbers

LARGEST = 127
FEW = 16                      # rows up to which kernels for few rows are faster
CHUNK = 4096                  # rows of a matrix that are widened at once
COLUMNS = 16                  # the CPU's kernel reads so many at a time, past the end too


def in_int8(linear: nn.Module) -> nn.Module:
    """A linear layer (or embedding, as a head) in eight bits: a ``form`` for load_model."""
    return Int8Linear(linear.weight)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> codes, int8 of its shape, and scales (out,), of bfloat16's numbers.

    So no kernel rounds a scale, in whatever dtype it computes.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    for start in range(0, len(weight), CHUNK):
        rows = slice(start, start + CHUNK)
        require_numbers(weight[rows])
        wide = weight[rows].float()
        largest = wide.abs().amax(dim=1)
        scales[rows] = (largest / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny)
        steps = wide / scales[rows, None].float()
        codes[rows] = steps.round_().clamp_(-LARGEST, LARGEST)
    return codes, scales


def plain_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (rows, in), codes (out, in), scales (out,) -> x (codes * scales)^T, (rows, out)."""
    wide = x.float()                      # in float16 sums of codes would overflow
    pieces = []
    for some, scale in zip(codes.split(CHUNK), scales.split(CHUNK)):
        pieces.append(F.linear(wide, some.float()) * scale.float())
    return torch.cat(pieces, dim=-1).to(x.dtype)


class Int8Linear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in eight bits."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.codes, self.scales = quantise(weight)
        self.product = choose_product(weight)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()   # kernels read them as they lie
        product = self.product if len(rows) <= FEW else plain_product
        return product(rows, self.codes, self.scales).reshape(*x.shape[:-1], len(self.codes))


def choose_product(weight: Tensor):
    """The fastest form of ``plain_product`` for a few rows."""
    device = weight.device.type
    if device == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % COLUMNS == 0:
        return torch._weight_int8pack_mm
    if device == "cuda":
        from extras.int8_cuda import product
        return product
    return plain_product
