"""What the tests share: a random model small enough to enumerate, the bundled one, and a real one if it is here.

Set CLASP_REAL_MODEL to a folder (tools/gguf_to_safetensors.py makes one) and the tests that want a real
LLaMA run on it; without it they are skipped. Set CLASP_TEST_DEVICE to cuda to run everything there.
"""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import Config, KVCache, Llama, load_model  # noqa: E402

settings.register_profile("default", max_examples=300, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.load_profile("default")

DEVICE = os.environ.get("CLASP_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""           # the programs would take a GPU that is there
BUNDLED = ROOT / "checkpoints" / "fairy-tales"
REAL = os.environ.get("CLASP_REAL_MODEL")


def random_model(layers=6, vocabulary=61, seed=0, residual=0.3, head_scale=1.0, context=256) -> Llama:
    """A LLaMA with random weights. ``residual`` scales what each layer adds: small, and skipping matters little."""
    torch.manual_seed(seed)
    model = Llama(Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=context))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if name.endswith(("o.weight", "down.weight")):
            weight.data.mul_(residual)
    model.embed.weight.data.mul_(6)
    model.head.weight.data.mul_(head_scale)
    return model.requires_grad_(False).eval().to(DEVICE)


def tokens_of(model, count, seed=0) -> list[int]:
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def feed(model, cache: KVCache, tokens: list[int]):
    """Run tokens into the cache; returns the hidden states of the last, (L+1, hidden)."""
    states = model(torch.tensor([tokens], device=DEVICE), cache)
    return torch.stack([state[0, -1] for state in states])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def bundled() -> Llama:
    return load_model(BUNDLED, DEVICE)


@pytest.fixture(scope="session")
def real() -> Llama:
    if not REAL:
        pytest.skip("CLASP_REAL_MODEL is not set")
    return load_model(Path(REAL), DEVICE)


@pytest.fixture(params=["random", "bundled", "real"])
def any_model(request) -> Llama:
    return random_model() if request.param == "random" else request.getfixturevalue(request.param)
