"""Weights in the layout that this CPU's matrix kernels read fastest. Imported by programs, not by the core.

A bfloat16 product of a few rows is bound by reading the weights. From the usual row-major layout, oneDNN rearranges
them for AVX-512 or AMX at every call; packed once, after loading, the same kernels read them straight, and 5 rows
cost what 1 does: verification is nearly free. (float32 gains nothing for single rows, and float16 loses.)
"""
import torch
from torch import Tensor, nn

from model import Llama


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in oneDNN's own order; the operators are torch.compile's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)          # 8: the rows it may expect

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model: Llama) -> Llama:
    """The same model, its matrices packed in place if it is in bfloat16 on a CPU that computes in it; else untouched.

    A packed layer has no weight to look at or save. A tied head becomes a matrix of its own beside the embedding.
    """
    weight = model.embed.weight
    if (weight.device.type == "cpu" and weight.dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        for layer in model.layers:
            for name in ("qkv", "o", "gate_up", "down"):
                setattr(layer, name, PackedLinear(getattr(layer, name).weight))
        model.head = PackedLinear((model.embed if model.head is None else model.head).weight)
    return model
