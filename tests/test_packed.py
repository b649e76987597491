"""packed.py computes what the model computes: every remedy, every dtype, every number of rows."""
import copy

import pytest
import torch

import packed
from conftest import DEVICE, random_model
from exact import exact_width
from model import KVCache, RMSNorm
from packed import Float16Linear, PackedLinear, QuickNorm, WeightFirstLinear, bytes_read, pack

X86 = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
FBGEMM = X86 and "fbgemm" in torch.backends.quantized.supported_engines
IN_BFLOAT16 = X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not X86 or DEVICE != "cpu", reason="products elsewhere stay as they are")


def saved_in(dtype, model):
    """The same model as if its weights had been saved in ``dtype``."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).to(weight)
    return model


def logits(model, rows):
    tokens, cache = torch.arange(rows)[None] % model.config.vocab_size, KVCache(model, 64)
    with torch.inference_mode():
        model(tokens[:, :3] * 0 + 1, cache)
        return model.logits(model(tokens, cache)[-1])[0]


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [dict(LARGE=1, THREADED=1), dict(LARGE=10**9, THREADED=10**9)], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_logits_are_the_models(dtype, saved, limits, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(packed, name, value)
    exact = saved_in(dtype, saved_in(saved, random_model()))         # in float32: what rounding is held against
    plain = copy.deepcopy(exact).to(dtype)
    fast = pack(copy.deepcopy(plain))
    for rows in (1, 2, 4, 5, 13, 40):
        expected = logits(exact, rows)
        off, allowed = (logits(fast, rows) - expected).abs().max(), (logits(plain, rows) - expected).abs().max()
        assert off <= 2 * allowed + 1e-5 * expected.abs().max()


@pytest.mark.skipif(not FBGEMM, reason="no FBGEMM")
def test_weights_saved_in_16_bits_lie_in_16_bits_and_others_do_not(monkeypatch):
    monkeypatch.setattr(packed, "LARGE", 61 * 32)                     # the head is large
    for saved in (torch.bfloat16, torch.float16):
        model = pack(saved_in(saved, random_model()))
        assert {type(part) for part in (model.head, model.layers[0].qkv, model.layers[-1].down)} == {Float16Linear}
    model = pack(random_model())
    assert (type(model.head), type(model.layers[0].o)) == (PackedLinear, WeightFirstLinear)
    for dtype, other in ((torch.float32, WeightFirstLinear), (torch.bfloat16, PackedLinear if IN_BFLOAT16 else torch.nn.Linear)):
        model = saved_in(torch.bfloat16, random_model()).to(dtype)
        model.head = None                                             # tied
        model.layers[2].down.weight[0, 0] = model.embed.weight[3, 3] = 2.0 ** 17           # more than float16 holds
        pack(model)
        assert type(model.layers[2].down) is other and logits(model, 2).shape == (2, 61)
        assert IN_BFLOAT16 or type(model.layers[3].down) is Float16Linear


@pytest.mark.skipif(not FBGEMM or IN_BFLOAT16, reason="no FBGEMM, or oneDNN has its own way")
def test_small_products_without_the_entrance_that_needs_no_threads(monkeypatch):
    model = saved_in(torch.bfloat16, random_model())
    expected = logits(model, 4)
    monkeypatch.delattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    torch.testing.assert_close(logits(pack(model), 4), expected, rtol=1e-4, atol=1e-5)


def test_bytes_read_are_those_of_the_matrices():
    c = random_model().config
    layer = c.hidden_size * (2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) + 3 * c.intermediate_size)
    count = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
    assert bytes_read(random_model()) == bytes_read(pack(random_model())) == 4 * count
    if FBGEMM:
        assert bytes_read(pack(saved_in(torch.bfloat16, random_model()))) == 2 * count
        tiny = random_model()
        for weight in tiny.parameters():
            weight.data *= 2.0 ** -14                                 # true float32, all of it below what float16 tells apart well
        assert bytes_read(pack(tiny)) == 4 * count


@pytest.mark.skipif(not FBGEMM, reason="no FBGEMM")
def test_a_width_is_asked_of_every_kind_of_layer(monkeypatch):
    model, asked = saved_in(torch.bfloat16, random_model()), []
    model.layers[2].down.weight[0, 0] = 1 + 2.0 ** -20                # not of 16 bits: this layer is computed by other kernels
    pack(model)
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: asked.append(i))
    exact_width(model, 5)
    assert set(asked) == {2, 5}


def test_quick_norm_is_rms_norm():
    norm = RMSNorm(48, 1e-5)
    norm.weight.data = torch.randn(48)
    for scale in (1e-6, 1e-3, 1, 1e6):                                # where eps decides, and where it does not
        x = scale * torch.randn(1, 5, 48)
        torch.testing.assert_close(QuickNorm(norm)(x), norm(x), rtol=1e-5, atol=0)
    assert not QuickNorm(norm)(torch.zeros(1, 1, 48)).any()
