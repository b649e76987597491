"""Products of a few rows as fast as this CPU reads the weights. Imported by programs, not by the core.

Decoding multiplies 1 row (plain, draft), K+1 (verification) or up to M (the DP) with each matrix, and the time should
be that of reading the matrix, whatever the number. ``nn.Linear`` is far from it: several rows cost two to four times
what one does, and that is what speculative decoding lives on. Two remedies, see results/speed.md:

* Large matrices are packed into oneDNN's own order, after loading, without compilation. In bfloat16 (on a CPU that
  computes in it) oneDNN would otherwise rearrange them at every call.
* Small ones, where oneDNN's overhead of some 20 us a call shows, stay as they are, but stand on the left: MKL computes
  (W x^T)^T up to twice as fast as x W^T.

float16 stays with nn.Linear, and so does all that is not on an x86 CPU.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama, RMSNorm

LARGE = 2 ** 18               # numbers in a matrix; where the two remedies cost the same
FEW = 12                      # rows up to which MKL is faster with the weight on the left


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in oneDNN's own order; the operators are torch.compile's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)          # 8: the rows it may expect

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class QuickNorm(nn.Module):
    """RMSNorm as x / sqrt(|x|^2 + dim eps) * sqrt(dim) weight, in float32: 4 kernels, where a CPU's F.rms_norm takes 9."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        size = norm.weight.numel()
        self.weight = norm.weight.float() * size ** 0.5
        self.small = torch.tensor((size * norm.eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), self.small) * self.weight).to(x.dtype)


class WeightFirstLinear(nn.Module):
    """``nn.Linear`` without bias that multiplies a few rows x (1, rows, in) as (W x^T)^T."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if not 1 < x.shape[1] <= FEW:
            return F.linear(x, self.weight)
        return torch.mm(self.weight, x[0].t()).t().contiguous()[None]


def pack(model: Llama) -> Llama:
    """The same model, made faster in place for inference with batch 1 on an x86 CPU; elsewhere untouched.

    A packed layer has no weight to look at or save. A tied head becomes a matrix of its own beside the embedding.
    """
    weight = model.embed.weight
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return model
    in_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def faster(linear: nn.Linear) -> nn.Module:
        if in_bfloat16 or (linear.weight.dtype == torch.float32 and linear.weight.numel() >= LARGE):
            return PackedLinear(linear.weight)
        return WeightFirstLinear(linear.weight) if linear.weight.dtype == torch.float32 else linear

    for layer in model.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, faster(getattr(layer, name)))
        layer.attention_norm, layer.mlp_norm = QuickNorm(layer.attention_norm), QuickNorm(layer.mlp_norm)
    if in_bfloat16 or weight.dtype == torch.float32:
        model.head = faster(model.embed if model.head is None else model.head)
    return model
