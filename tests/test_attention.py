"""extras/attention.py: every form computes what model.attention does."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, random_model, same_bits

from extras import attention as forms
from extras.attention import PIECE, FoldOnce, choose, fold_mask, folded, in_pieces, written_out
from extras.packed import pack
from model import ALIGNED, KVCache, Llama, attention, causal_mask

FORMS = {
    "folded": folded,
    "folded, the mask once": FoldOnce(folded),
    "written out": written_out,
    "in pieces": in_pieces,
}
SHAPES = [(4, 2), (6, 1), (3, 3)]                        # heads, kv_heads


def some(heads: int, kv_heads: int, rows: int, slots: int, head_dim: int = 16):
    torch.manual_seed(rows + slots)
    q = torch.randn(1, heads, rows, head_dim, device=DEVICE)
    k, v = torch.randn(2, 1, kv_heads, slots, head_dim, device=DEVICE)
    return q, k, v


def random_mask(rows: int, slots: int) -> torch.Tensor:
    """Half of the slots seen, at random; of each row the first."""
    seen = torch.rand(rows, slots, device=DEVICE) < 0.5
    seen[:, 0] = True
    return torch.full((rows, slots), -torch.inf, device=DEVICE).masked_fill(seen, 0)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("heads, kv_heads", SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_with_a_mask(form, heads, kv_heads, rows):
    q, k, v = some(heads, kv_heads, rows, 2 * PIECE + 32)
    mask = random_mask(rows, k.shape[2])
    expected = attention(q, k, v, mask)
    assert torch.allclose(form(q, k, v, mask), expected, atol=1e-5)
    repeated = mask.repeat(heads // kv_heads, 1)
    assert torch.allclose(form(q, k, v, repeated), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("heads, kv_heads", SHAPES)
@pytest.mark.parametrize("form", [folded, FoldOnce(folded), in_pieces])
def test_without_a_mask_one_row_sees_all_and_several_are_causal(form, heads, kv_heads, rows):
    q, k, v = some(heads, kv_heads, rows, 32 if rows == 1 else rows)
    assert torch.allclose(form(q, k, v, None), attention(q, k, v, None), atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pieces_that_are_masked_as_a_whole_add_nothing(form):
    q, k, v = some(4, 2, 3, 4 * PIECE)
    mask = causal_mask(PIECE + 5, 3, 4 * PIECE, q)       # the last two pieces: nobody looks there
    expected = attention(q, k, v, mask)
    v[:, :, 2 * PIECE:] = 1e6
    assert torch.allclose(form(q, k, v, mask), expected, atol=1e-5)


def test_a_rows_bits_do_not_depend_on_rows_behind_it_in_pieces():
    q, k, v = some(4, 2, 8, 4 * PIECE)
    mask = random_mask(8, 4 * PIECE)
    expected = in_pieces(q, k, v, mask)
    q[:, :, 5:] = 3.0
    assert same_bits(in_pieces(q, k, v, mask)[:, :, :5], expected[:, :, :5])


def test_folding_repeats_no_keys_or_values(monkeypatch):
    given = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **settings):
        given.append((q.shape, k.data_ptr(), settings))
        return kernel(q, k, v, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k, v = some(8, 2, 3, 32)
    folded(q, k, v, torch.zeros(3, 32, device=DEVICE))
    [(shape, address, settings)] = given
    assert shape == (1, 2, 12, 16)
    assert address == k.data_ptr()
    assert not settings.get("enable_gqa")


def test_cutting_into_pieces_copies_no_keys_or_values(monkeypatch):
    given = []
    attend = forms.attend_and_sum

    def watched(q, k, v, mask):
        given.append((len(k), k.data_ptr(), v.data_ptr()))
        return attend(q, k, v, mask)

    monkeypatch.setattr(forms, "attend_and_sum", watched)
    q, k, v = some(4, 2, 3, 2 * PIECE + 32)
    in_pieces(q, k, v, random_mask(3, k.shape[2]))
    rest = 2 * PIECE * k.stride(2) * k.element_size()    # bytes before the last slots
    assert given == [(2, k.data_ptr(), v.data_ptr()), (1, k.data_ptr() + rest, v.data_ptr() + rest)]


# ---------------------------------------------------------------- masks

def test_a_pass_folds_its_mask_once(monkeypatch):
    """All layers of a pass get the same mask; the next pass has another."""
    folds = []
    fold = fold_mask

    def counted(mask, rows):
        folds.append(len(mask) != rows)
        return fold(mask, rows)

    monkeypatch.setattr(forms, "fold_mask", counted)
    model = random_model(layers=5)
    forms.attend_by(model, FoldOnce(folded))
    cache = KVCache(model, 40)
    for _ in range(3):
        model(torch.tensor([[1, 2, 3]], device=DEVICE), cache)
    assert sum(folds) == 2                               # the first pass starts at slot 0: no mask


def test_a_pass_in_another_thread_does_not_exchange_the_folded_mask(monkeypatch):
    """Here it comes in between, when a mask is about to be folded."""
    seen = []
    fold = FoldOnce(lambda q, k, v, mask: seen.append(mask))
    q = torch.zeros(1, 4, 3, 8)
    k = torch.zeros(1, 2, 5, 8)
    ours, theirs = torch.zeros(3, 5), torch.ones(3, 5)

    def interrupted(mask, rows):
        if mask is ours:
            fold(q, k, k, theirs)
        return fold_mask(mask, rows)

    monkeypatch.setattr(forms, "fold_mask", interrupted)
    for _ in range(2):
        seen.clear()
        fold(q, k, k, ours)
        assert seen[-1].unique().tolist() == [0]
        fold(q, k, k, theirs)
        assert seen[-1].unique().tolist() == [1]


@pytest.mark.parametrize("slots", [1, 7, 8, 29, 130])
def test_rows_of_masks_begin_at_multiples_that_gpus_read_without_a_copy(slots):
    x = torch.zeros(1, device=DEVICE)
    mask = causal_mask(0, 3, slots, x)
    for one in (mask, fold_mask(mask, 6)):
        assert one.shape[1] == slots
        assert one.stride(0) % ALIGNED == 0


@pytest.mark.parametrize("layers", [3, 20, 28, 30])
def test_a_cache_has_a_multiple_of_slots_that_gpus_read_without_a_copy(layers):
    cache = KVCache(random_model(layers=layers), 40, scratch=5)
    assert cache.slots.shape[-2] % ALIGNED == 0


# ---------------------------------------------------------------- which

def on(device: str, dtype: torch.dtype) -> Llama:
    """What ``choose`` looks at."""
    weight = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return SimpleNamespace(layers=[SimpleNamespace()], embed=SimpleNamespace(weight=weight))


def test_on_cuda_pack_exchanges_attention_and_keeps_cudnns_out():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        model = pack(on("cuda", torch.bfloat16))
        assert model.layers[0].attend.form.args[:2] == (folded, in_pieces)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [64, 5000])
@pytest.mark.parametrize("rows", [1, 5])
def test_whatever_is_chosen_is_attention(device, dtype, slots, rows):
    form = choose(on(device, dtype))
    q, k, v = some(4, 2, rows, slots)
    mask = random_mask(rows, slots)
    expected = attention(q, k, v, mask)
    error = 1e-5 if dtype == torch.float32 else 2e-2
    given = [x.to(dtype) for x in (q, k, v, mask)]
    assert torch.allclose(form(*given).float(), expected, atol=error)


def test_a_form_for_long_texts_is_for_few_rows():
    taken = []
    form = partial(forms.by_length, lambda *given: taken.append("short"),
                   lambda *given: taken.append("long"), 100)
    for rows, slots, mask in [(5, 99, True), (5, 100, True), (33, 100, True), (1, 100, False),
                              (5, 100, False)]:
        q, k, v = some(4, 2, rows, slots)
        form(q, k, v, random_mask(rows, slots) if mask else None)
    assert taken == ["short", "long", "short", "long", "short"]
