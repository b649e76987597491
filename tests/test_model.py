"""model.py: the right numbers, layers that can be left out, and a cache that rolls back."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, feed, random_model, tokens_of, valid
from safetensors.torch import load_file

from checkpoint import load_model
from model import KVCache, causal_mask, inverse_frequencies

GOLDEN = Path(__file__).parent / "golden"
TINY = sorted(path.parent for path in GOLDEN.glob("*/config.json"))


def relative_error(got, expected) -> float:
    return ((got.cpu() - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- the right numbers

@pytest.mark.parametrize("folder", TINY, ids=lambda path: path.name)
def test_logits_equal_an_independent_implementation(folder):
    expected = load_file(folder / "expected")
    model = load_model(folder, DEVICE)
    tokens = expected["tokens"].to(DEVICE)
    at_once = model.logits(model(tokens[None])[-1])[0]
    assert relative_error(at_once, expected["logits"]) < 1e-4

    cache = KVCache(model, len(tokens))
    pieces = tokens.split([1, 20, 1, 5, 21])
    logits = [model.logits(model(piece[None], cache)[-1])[0] for piece in pieces]
    assert relative_error(torch.cat(logits), expected["logits"]) < 1e-4


def test_logits_of_a_real_model_equal_an_independent_implementation(real):
    expected = load_file(GOLDEN / "smollm2.expected")
    tokens = expected["tokens"].to(DEVICE)
    logits = real.logits(real(tokens[None])[-1])[0]
    assert relative_error(logits[:, ::256], expected["logits"]) < 1e-4


def test_frequencies_of_llama_31_stay_are_blended_or_are_slowed_down():
    """By its rule for wavelengths, with its own numbers, which have all three kinds of pairs."""
    original, factor, low, high = 8192, 8.0, 1.0, 4.0
    expected = []
    kinds = []
    for pair in range(64):
        frequency = 500000.0 ** (-pair / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            kinds.append("fast")
            expected.append(frequency)
        elif wavelength > original / low:
            kinds.append("slow")
            expected.append(frequency / factor)
        else:
            kinds.append("between")
            share = (original / wavelength - low) / (high - low)
            expected.append(share * frequency + (1 - share) * frequency / factor)
    assert set(kinds) == {"fast", "between", "slow"}
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = replace(
        random_model(layers=1).config, head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    assert inverse_frequencies(config).tolist() == pytest.approx(expected, rel=1e-5)


def test_slots_past_a_row_do_not_change_it():
    """Attention may read whole blocks of the cache: what lies behind a row is masked."""
    model = random_model()
    tokens = torch.tensor([tokens_of(model, 5)], device=DEVICE)
    filled = KVCache(model, 100)
    blocks = KVCache(model, 100)
    blocks.slots.normal_()
    expected = model(tokens, filled)[-1]
    assert torch.allclose(model(tokens, blocks, slots=100)[-1], expected, atol=1e-5)


def test_a_row_sees_the_slots_up_to_its_own():
    mask = causal_mask(2, 3, 6, torch.zeros(1))
    assert (mask == 0).tolist() == [
        [True, True, True, False, False, False],
        [True, True, True, True, False, False],
        [True, True, True, True, True, False],
    ]


# ---------------------------------------------------------------- skipping

def test_skipping_layers_is_leaving_them_out():
    model = random_model(layers=4)
    tokens = torch.tensor([[5, 6, 7]], device=DEVICE)
    skipping = model(tokens, skip={1, 2})
    assert torch.equal(skipping[2], skipping[1])
    assert torch.equal(skipping[3], skipping[1])
    del model.layers[1:3]
    assert torch.equal(model(tokens)[-1], skipping[-1])


def test_a_skipped_layer_leaves_its_slots_as_they_were():
    model = random_model(layers=4)
    cache = KVCache(model, 20)
    feed(model, cache, [1, 2])
    before = cache.slots.clone()
    model(torch.tensor([[3]], device=DEVICE), cache, skip={0, 3})
    for layer in range(4):
        changed = not torch.equal(cache.slots[:, layer], before[:, layer])
        assert changed == (layer in {1, 2})


# ---------------------------------------------------------------- the cache

def test_rollback_is_an_integer():
    model = random_model()
    kept = tokens_of(model, 7, seed=1)
    rejected = tokens_of(model, 5, seed=2)
    after = tokens_of(model, 3, seed=3)
    straight = KVCache(model, 20)
    rolled_back = KVCache(model, 20)
    feed(model, straight, kept)
    feed(model, rolled_back, kept)
    feed(model, rolled_back, rejected)
    rolled_back.length = len(kept)
    assert torch.equal(feed(model, straight, after), feed(model, rolled_back, after))
    assert torch.equal(valid(straight), valid(rolled_back))


def test_the_cache_has_scratch_slots_for_a_pass_and_for_the_dp():
    model = random_model(layers=6)
    for tokens in (1, 128, 129, 200):
        for rows in (1, 6, 20):
            cache = KVCache(model, tokens, rows)
            capacity = cache.slots.shape[-2]
            assert capacity >= tokens + max(rows, 6)
            assert cache.tokens % 128 == 0
            assert len(cache.cos) == len(cache.sin) == capacity


def test_a_config_knows_the_shapes_of_its_layers():
    model = random_model(layers=1)
    matrices = [tuple(p.shape) for p in model.layers[0].parameters() if p.ndim == 2]
    assert matrices == model.config.layer_shapes
