"""What the tests share: a random model small enough to enumerate, the bundled one, a real one.

    python -m pytest -q tests                     what matters most of everything, in two minutes
    python -m pytest -q tests -m thorough         the rest: more examples, long texts, processes
    python -m pytest -q tests -m ""               all of it

Set CLASP_REAL_MODEL to a folder (tools/gguf_to_safetensors.py makes one) and the tests that want a
real LLaMA run on it; without it they are skipped. Set CLASP_TEST_DEVICE to cuda to run there.
"""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import BUNDLED, load_model  # noqa: E402
from extras.exact import exact_width  # noqa: E402
from generate import pack  # noqa: E402
from model import Config, KVCache, Llama  # noqa: E402

DEVICE = os.environ.get("CLASP_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""           # the programs would take a GPU that is there
REAL = os.environ.get("CLASP_REAL_MODEL")
IN_ASCII = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}   # a locale
THREADS = torch.get_num_threads()
torch.set_num_threads(1)                              # on cores that others use, threads only wait

settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.register_profile("gpu", max_examples=8, deadline=None, derandomize=True)    # waits much
settings.load_profile("default" if DEVICE == "cpu" else "gpu")
AT_LENGTH = 300 if DEVICE == "cpu" else 30            # examples of a property marked thorough


def at_length(divisor: int = 1) -> settings:
    """Settings of a property's thorough variant: 300 examples, or as many as the profile says."""
    return settings(max_examples=max(AT_LENGTH, settings().max_examples) // divisor)


def random_model(
    layers=6, vocabulary=61, seed=0, residual=0.3, head_scale=1.0, context=256, heads=4
) -> Llama:
    """A LLaMA with random weights.

    residual: scales what each layer adds; where it is small, skipping matters little.
    """
    torch.manual_seed(seed)
    config = Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=8,
        max_position_embeddings=context)
    model = Llama(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if name.endswith(("o.weight", "down.weight")):
            weight.data.mul_(residual)
    model.embed.weight.data.mul_(6)
    model.head.weight.data.mul_(head_scale)
    return as_decoded(model.requires_grad_(False).eval().to(DEVICE))


def as_decoded(model: Llama) -> Llama:
    """As the programs run it on this device: on a GPU with its own form of attention.

    On a CPU tests look at the plain model; that the packed one is equal is for test_packed.py.
    """
    return model if DEVICE == "cpu" else pack(model)


def model_that_overflows():
    """Layer 4 makes NaN of all that has not passed layer 3, so a draft without it is NaN."""
    model = random_model()
    sign = torch.zeros(32, device=DEVICE)
    sign[0] = 1e4

    def add_sign(module, given, out):
        return out + sign

    def expect_sign(module, given):
        x = given[0]
        return torch.where(x[..., :1] > 5e3, x - sign, torch.nan), *given[1:]

    model.layers[3].register_forward_hook(add_sign)
    model.layers[4].register_forward_pre_hook(expect_sign)
    return model


def tokens_of(model, count: int, seed: int = 0) -> list[int]:
    """Random tokens of a model's vocabulary."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=random).tolist()


def feed(model, cache: KVCache, tokens: list[int]) -> torch.Tensor:
    """Run tokens into the cache; returns the hidden states of the last, (L+1, hidden)."""
    states = model(torch.tensor([tokens], device=DEVICE), cache)
    return torch.stack([state[0, -1] for state in states])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Stricter than equality, for which 0 is -0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def valid(cache: KVCache, length: int | None = None) -> torch.Tensor:
    """Keys and values of a cache's first ``length`` tokens; by default of all valid ones."""
    end = cache.length if length is None else length
    return cache.slots[..., :end, :]


def width_for(model, rows: int) -> int:
    """``exact_width``, on machines where there is one."""
    width = exact_width(model, rows)
    if width is None:
        pytest.skip("no number of rows is exact on this machine")
    return width


def all_but(kept: int, model) -> int:
    """How many layers to skip for a draft that runs so few."""
    return max(1, len(model.layers) - kept)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def all_threads():
    """For what kernels compute when they divide the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bundled() -> Llama:
    return as_decoded(load_model(BUNDLED, DEVICE))


@pytest.fixture(scope="session")
def real() -> Llama:
    if not REAL:
        pytest.skip("CLASP_REAL_MODEL is not set")
    return as_decoded(load_model(Path(REAL), DEVICE))


@pytest.fixture(params=["random", "bundled", "real"])
def any_model(request) -> Llama:
    if request.param == "random":
        return random_model()
    return request.getfixturevalue(request.param)
