"""packed.py computes what the model computes: every remedy, every dtype, every number of rows."""
import copy
from dataclasses import asdict, replace

import pytest
import torch
from conftest import DEVICE, random_model
from folders import set_fields, small_folder
from safetensors.torch import save_file

from checkpoint import load_model, named_weights
from extras import packed
from extras.exact import is_even
from extras.packed import (
    Float16Linear,
    PackedLinear,
    QuickNorm,
    WeightFirstLinear,
    bytes_read,
    choose_form,
    choose_threads,
    pack,
    threaded_product,
    unthreaded_product,
)
from model import KVCache, ModelError, RMSNorm
from speculative import autoregressive

X86 = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
FBGEMM = X86 and "fbgemm" in torch.backends.quantized.supported_engines
IN_BFLOAT16 = X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(
    not X86 or DEVICE != "cpu", reason="products elsewhere stay as they are")
needs_fbgemm = pytest.mark.skipif(not FBGEMM, reason="no FBGEMM")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_LARGE = {"LARGE": 1, "THREADED": 1}
ALL_SMALL = {"LARGE": 10 ** 9, "THREADED": 10 ** 9}


def saved_in(dtype, model):
    """The same model as if its weights had been saved in ``dtype``."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).to(weight)
    return model


def logits(model, rows: int) -> torch.Tensor:
    """Of so many tokens after three others in the cache."""
    cache = KVCache(model, 64)
    model(torch.ones(1, 3, dtype=torch.long), cache)
    tokens = torch.arange(rows)[None] % model.config.vocab_size
    return model.logits(model(tokens, cache)[-1])[0]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- what is computed

@pytest.fixture(params=[ALL_LARGE, ALL_SMALL], ids=["large", "small"])
def forms(request, monkeypatch):
    """All matrices have the form of large ones, then of small ones."""
    for name, value in request.param.items():
        monkeypatch.setattr(packed, name, value)


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_logits_are_the_models(dtype, saved, forms):
    """In 16 bits: as near to those of the same weights in float32 as nn.Linear's."""
    exact = saved_in(dtype, saved_in(saved, random_model()))
    plain = copy.deepcopy(exact).to(dtype)
    fast = pack(copy.deepcopy(plain))
    for rows in (1, 2, 4, 5, 13, 40):
        expected = logits(exact, rows)
        error = (logits(fast, rows) - expected).abs().max()
        allowed = (logits(plain, rows) - expected).abs().max()
        assert error <= 2 * allowed + 1e-5 * expected.abs().max()


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_may_have_any_number_of_axes(dtype, saved, forms):
    """As nn.Linear has it. A drafter asks for the logits of one state: (hidden,)."""
    model = pack(saved_in(dtype, saved_in(saved, random_model())).to(dtype))
    states = torch.randn(2, 3, 4, model.config.hidden_size).to(dtype)
    expected = model.logits(states)
    for index in ((0, 0, 0), (0, 0), (0,), (slice(0, 1), 0)):
        torch.testing.assert_close(model.logits(states[index]), expected[index])
    assert model.logits(states[:0]).shape == (0, 3, 4, model.config.vocab_size)


@needs_fbgemm
@pytest.mark.parametrize("std", [1.0, *(10.0 ** -k for k in range(2, 9))])
def test_products_keep_the_digits_of_bfloat16_weights_of_any_size(std):
    """Below 2^-14 float16 has fewer digits than bfloat16: such rows are scaled."""
    torch.manual_seed(0)
    weight = (std * torch.randn(48, 32)).bfloat16().float()
    x = torch.randn(1, 5, 32)
    expected = torch.nn.functional.linear(x, weight)
    for multiply in (None, unthreaded_product()):
        assert relative_error(Float16Linear(weight, multiply)(x), expected) < 1e-5


@needs_fbgemm
@pytest.mark.parametrize("std", [1.0, *(10.0 ** -k for k in range(2, 9))])
def test_packed_logits_are_the_models_for_bfloat16_weights_of_any_size(std):
    model = random_model()
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=std)
    model = saved_in(torch.bfloat16, model)
    expected = logits(model, 5)
    assert relative_error(logits(pack(copy.deepcopy(model)), 5), expected) < 1e-5


def with_scaled_layers(model, k: int):
    """The same function: v and up of every layer are scaled by 2^-k, and o and down by 2^k."""
    for layer in model.layers:
        values = layer.qkv.weight[-layer.kv_heads * layer.head_dim:]
        up = layer.gate_up.weight.chunk(2)[1]
        values.mul_(2.0 ** -k)
        up.mul_(2.0 ** -k)
        layer.o.weight.mul_(2.0 ** k)
        layer.down.weight.mul_(2.0 ** k)
    return model


@needs_fbgemm
@pytest.mark.parametrize("k", [8, 12, 16, 20, 25, 30])
def test_rows_of_tiny_and_huge_weights_lose_no_digit(k):
    plain = saved_in(torch.bfloat16, random_model())
    expected = logits(plain, 5)
    scaled = with_scaled_layers(copy.deepcopy(plain), k)
    assert relative_error(logits(scaled, 5), expected) < 1e-5        # of what is compared with
    fast = pack(scaled)
    assert type(fast.layers[0].down) is Float16Linear
    assert relative_error(logits(fast, 5), expected) < 1e-5


@pytest.mark.thorough
@needs_fbgemm
@pytest.mark.parametrize("k", [0, 12, 30])
def test_packed_logits_are_those_of_transformers(k, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = with_scaled_layers(saved_in(torch.bfloat16, random_model()), k)
    weights = {name: view.bfloat16().contiguous() for name, view in named_weights(model).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_fields(tmp_path, "config.json", model_type="llama", architectures=["LlamaForCausalLM"],
               **asdict(model.config))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = pack(load_model(tmp_path))
    tokens = torch.arange(40)[None]
    expected = theirs(tokens).logits
    assert relative_error(ours.logits(ours(tokens)[-1]), expected) < 1e-5


@pytest.mark.skipif(not FBGEMM or IN_BFLOAT16, reason="no FBGEMM, or oneDNN has its own way")
def test_small_products_without_the_entrance_that_needs_no_threads(monkeypatch):
    model = saved_in(torch.bfloat16, random_model())
    expected = logits(model, 4)
    monkeypatch.delattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    fast = pack(model)
    assert fast.layers[0].o.multiply is threaded_product
    torch.testing.assert_close(logits(fast, 4), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner, threads", [(384, 1), (8192, 2)])
def test_only_models_with_large_layers_share_their_work_among_threads(inner, threads):
    before = torch.get_num_threads()
    model = random_model()
    model.config = replace(model.config, hidden_size=192, intermediate_size=inner)
    try:
        torch.set_num_threads(2)
        choose_threads(model)
        assert torch.get_num_threads() == (threads if DEVICE == "cpu" else 2)
    finally:
        torch.set_num_threads(before)


def test_quick_norm_is_rms_norm():
    norm = RMSNorm(48, 1e-5)
    norm.weight.data = torch.randn(48)
    for scale in (1e-6, 1e-3, 1, 1e6):                   # where eps decides, and where it does not
        x = scale * torch.randn(1, 5, 48)
        torch.testing.assert_close(QuickNorm(norm)(x), norm(x), rtol=1e-5, atol=0)
    assert not QuickNorm(norm)(torch.zeros(1, 1, 48)).any()


def test_what_is_packed_may_be_packed_again():
    model = pack(random_model())
    tokens = torch.tensor([[1, 2, 3]], device=DEVICE)
    before = model.logits(model(tokens)[-1])
    assert torch.equal(pack(model).logits(model(tokens)[-1]), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_while_loading_and_packed_afterwards_are_the_same(tmp_path, dtype):
    folder = small_folder(tmp_path / "small")
    device = torch.device("cpu")
    while_loading = pack(load_model(folder, device, dtype, choose_form(device, dtype)))
    afterwards = pack(load_model(folder, device, dtype))
    kinds = [[type(part) for part in model.modules()] for model in (while_loading, afterwards)]
    assert kinds[0] == kinds[1]
    assert torch.equal(logits(while_loading, 5), logits(afterwards, 5))


# ---------------------------------------------------------------- which remedy is taken

@needs_fbgemm
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_weights_saved_in_16_bits_lie_in_16_bits(monkeypatch, saved):
    monkeypatch.setattr(packed, "LARGE", 61 * 32)        # the head is large
    model = pack(saved_in(saved, random_model()))
    for part in (model.head, model.layers[0].qkv, model.layers[-1].down):
        assert type(part) is Float16Linear


@needs_fbgemm
def test_others_do_not(monkeypatch):
    monkeypatch.setattr(packed, "LARGE", 61 * 32)
    model = pack(random_model())
    assert type(model.head) is PackedLinear
    assert type(model.layers[0].o) is WeightFirstLinear


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_larger_than_float16_holds_lie_in_16_bits_too(dtype):
    """Also in a tied head, which is packed beside the embedding."""
    model = saved_in(torch.bfloat16, random_model()).to(dtype)
    model.head = None
    model.layers[2].down.weight[0, 0] = 2.0 ** 17
    model.embed.weight[3, 3] = 2.0 ** 17
    expected = logits(copy.deepcopy(model).float(), 2)
    allowed = relative_error(logits(model, 2).float(), expected)
    fast = pack(model)
    kind = PackedLinear if dtype == torch.bfloat16 and IN_BFLOAT16 else Float16Linear
    assert type(fast.head) is type(fast.layers[2].down) is kind
    assert relative_error(logits(fast, 2).float(), expected) <= 2 * allowed + 1e-5


@pytest.mark.parametrize("part", ["o", "head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(garbage, dtype, part):
    """FBGEMM would make large numbers of them, and the text would be nonsense."""
    model = saved_in(torch.bfloat16, random_model()).to(dtype)
    matrix = model.head if part == "head" else model.layers[3].o
    matrix.weight[5, 7] = garbage
    with pytest.raises(ModelError, match="NaN or infinity"):
        list(autoregressive(pack(model), [1, 2, 3], 8))


def matrix_sizes(model) -> int:
    """Numbers in all matrices that one token is multiplied with."""
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    matrices.append(model.embed.weight if model.head is None else model.head.weight)
    return sum(matrix.numel() for matrix in matrices)


def test_bytes_read_are_those_of_the_matrices():
    count = matrix_sizes(random_model())
    assert bytes_read(random_model()) == bytes_read(pack(random_model())) == 4 * count


@needs_fbgemm
@pytest.mark.parametrize("scale", [1, 2.0 ** -14, 2.0 ** 17], ids=str)
def test_two_bytes_are_read_of_each_weight_saved_in_16_bits(scale):
    model = saved_in(torch.bfloat16, random_model())
    for weight in model.parameters():
        weight.data *= scale
    assert bytes_read(pack(model)) == 2 * matrix_sizes(random_model())


@needs_fbgemm
@pytest.mark.parametrize("scale", [1, 2.0 ** -14], ids=str)
def test_four_bytes_are_read_of_each_true_float32_weight(scale):
    """Also where all of them lie below what float16 tells apart well."""
    model = random_model()
    for weight in model.parameters():
        weight.data *= scale
    assert bytes_read(pack(model)) == 4 * matrix_sizes(random_model())


@needs_fbgemm
def test_a_width_is_asked_of_every_kind_of_layer():
    model = saved_in(torch.bfloat16, random_model())
    model.layers[2].down.weight[0, 0] = 1 + 2.0 ** -20   # not of 16 bits: other kernels compute it
    pack(model)
    asked = set()
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: asked.add(i))
    is_even(model, 5)
    assert asked == {2, 5}
