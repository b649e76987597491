"""Products of a few rows as fast as this CPU reads the weights. Imported by programs, not by the core.

Decoding multiplies 1 row (plain, draft), K+1 (verification) or up to M (the DP) with each matrix, and the time should
be that of reading the matrix, whatever the number. ``nn.Linear`` is far from it: several rows cost two to four times
what one does, and that is what speculative decoding lives on. Remedies, see results/speed.md:

* Weights that were saved in 16 bits, as nearly all are, lie here in float16 whatever the model's dtype: half the bytes of
  float32. FBGEMM widens them in registers, and products and sums are float32.
* In bfloat16 on a CPU that computes in it, large and small matrices are packed into oneDNN's own order, after loading,
  without compilation; oneDNN would otherwise rearrange them at every call.
* Of true float32 weights, large matrices are packed so too. Small ones, where oneDNN's overhead of some 20 us a call
  shows, stay as they are, but stand on the left: MKL computes (W x^T)^T up to twice as fast as x W^T.

All that is not on an x86 CPU stays with nn.Linear. On CUDA attention is exchanged, see ``folded_attention``.
"""
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama, RMSNorm, attention

LARGE = 2 ** 18               # numbers in a float32 matrix from which on oneDNN is faster than MKL
FEW = 12                      # rows up to which MKL is faster with the weight on the left
THREADED = 3 * 2 ** 18        # numbers in a matrix from which on several threads are worth the call that starts them
ROUNDED = 2.0 ** -25          # float16 holds every bfloat16 weight below 2^16 to within this, finer than float32 sums are


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in oneDNN's own order; the operators are torch.compile's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)          # 8: the rows it may expect

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Float16Linear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in float16, in FBGEMM's order; x and its products are float32.

    The same kernels have two entrances: one that uses all threads, for 35 us a call, and one that does not, for 3 us.
    """

    def __init__(self, weight: Tensor, small=None):
        super().__init__()
        self.nbytes = 2 * weight.numel()
        if weight.numel() < THREADED and small:
            self.weight, self.multiply = torch.fbgemm_pack_gemm_matrix_fp16(weight.float()), small
        else:
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
            self.multiply = lambda x, weight, _: torch.ops.quantized.linear_dynamic_fp16(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x.float(), self.weight, None).to(x.dtype)


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
        if len(x) > 1 or not 1 < x.shape[1] <= FEW:
            return F.linear(x, self.weight)
        return torch.mm(self.weight, x[0].t()).t().contiguous()[None]


def folded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What model.attention computes, for CUDA: its fast kernels take no mask together with query groups.

    The heads of a group become rows of one head, so nothing is repeated but the mask, which may come so already.
    """
    rows, groups = q.shape[2], q.shape[1] // k.shape[1]
    if mask is None and rows > 1:                              # causal from slot 0: there is a kernel for that
        return attention(q, k, v, mask)
    if mask is not None and len(mask) < groups * rows:
        mask = mask.repeat(groups, 1)
    q_rows = q.reshape(len(q), k.shape[1], groups * rows, -1)
    return F.scaled_dot_product_attention(q_rows, k, v, attn_mask=mask).reshape(q.shape)


def attend_folded(model: Llama):
    """Let all layers take ``folded_attention``; and no attention of cuDNN's, in this whole process.

    PyTorch prefers that on some GPUs, but it plans anew, for tens of milliseconds, at every new number of slots: at each token.
    """
    for layer in model.layers:
        layer.attend = folded_attention
    if model.embed.weight.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def pack(model: Llama) -> Llama:
    """The same model, made faster in place for inference with batch 1, on an x86 CPU or CUDA; elsewhere untouched.

    A packed layer has no weight to look at or save. A tied head becomes a matrix of its own beside the embedding.
    """
    weight = model.embed.weight
    if weight.device.type == "cuda":
        attend_folded(model)
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return model
    in_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    fbgemm, small = "fbgemm" in torch.backends.quantized.supported_engines, unthreaded()

    def faster(linear: nn.Linear) -> nn.Module:
        weight = linear.weight
        if in_bfloat16:
            return PackedLinear(weight)
        if fbgemm and all(saved_in_16_bits(part) for part in weight.split(4096)):
            return Float16Linear(weight, small)
        if weight.dtype == torch.float32:
            return PackedLinear(weight) if weight.numel() >= LARGE else WeightFirstLinear(weight)
        return linear

    def pack_layer(layer):
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, faster(getattr(layer, name)))
        layer.attention_norm, layer.mlp_norm = QuickNorm(layer.attention_norm), QuickNorm(layer.mlp_norm)

    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as threads:      # FBGEMM packs 60 million weights a second in each
        head, layers = threads.submit(faster, model.head or model.embed), threads.map(pack_layer, model.layers)
        if weight.numel() >= 2 ** 27:                                 # LLaMA 3's sizes: seconds
            from tqdm import tqdm                                     # comes with huggingface-hub
            layers = tqdm(layers, "packing weights", len(model.layers), leave=False, disable=None)
        list(layers)
        if head.result() is not model.embed:
            model.head = head.result()
    return model


def saved_in_16_bits(weight: Tensor) -> bool:
    """Do float16 or bfloat16 hold these numbers, and float16 well enough?"""
    kept = weight.half().to(weight)
    return torch.equal(kept, weight) or (torch.equal(weight.bfloat16().to(weight), weight)
                                         and bool((weight - kept).abs().max() <= ROUNDED))


def unthreaded():
    """FBGEMM's entrance without threads, if this torch still has it: it is to be replaced in some future one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                               # which it says once
        try:
            multiply, few = torch.fbgemm_linear_fp16_weight_fp32_activation, torch.ones(8, 8)
            multiply(few, torch.fbgemm_pack_gemm_matrix_fp16(few), None)
            return multiply
        except (AttributeError, RuntimeError, TypeError):
            return None


def bytes_read(model: Llama) -> int:
    """Of weights, for one token: all matrices but an untied embedding, as they lie in memory."""
    matrices = [getattr(layer, name) for layer in model.layers for name in ("qkv", "o", "gate_up", "down")]
    return sum(getattr(m, "nbytes", 0) or m.weight.nbytes for m in (*matrices, model.head or model.embed))
