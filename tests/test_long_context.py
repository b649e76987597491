"""8,192 tokens: memory grows by the cache, and the text is still plain decoding's."""
import json
import os
import subprocess
import sys

import pytest
from conftest import REAL, ROOT

from checkpoint import BUNDLED

# A process of its own, since the peak of memory belongs to a process.
MEASURE = r"""
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from checkpoint import load_model
from extras.exact import exact_width
from model import KVCache
from speculative import DRAFT_LENGTH, autoregressive, clasp, prefill

NEW = 16
LONGEST = 8192
torch.set_grad_enabled(False)
model = load_model(Path(sys.argv[2]))
model.config = dataclasses.replace(model.config, max_position_embeddings=LONGEST)
c = model.config
random = torch.Generator().manual_seed(0)
text = torch.randint(300, c.vocab_size, (LONGEST,), generator=random).tolist()
width = exact_width(model, DRAFT_LENGTH + 1) or DRAFT_LENGTH + 1
status = Path("/proc/self/status")


def measure(length):
    Path("/proc/self/clear_refs").write_text("5")      # the peak starts anew, loading forgotten
    prompt = text[:length]
    cache = KVCache(model, length + NEW, width)
    prefill(model, cache, prompt[:-2])
    plain = list(autoregressive(model, prompt, NEW, width=width, cache=cache))
    cache.length = length - 2                          # back to the prompt
    drafted = list(clasp(model, prompt, NEW, width=width, cache=cache))
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]
    return {
        "length": length,
        "peak": 1024 * int(peak),
        "same": plain == drafted,
        "new_tokens": len(plain),
        "bytes_a_slot": cache.slots.nbytes / cache.slots.shape[-2],
    }


print(json.dumps({
    "runs": [measure(length) for length in (1024, 4096, LONGEST - NEW)],
    "expected": 2 * 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim,
}))
"""
PIECE = 512                   # rows of a prompt that are computed at once
# glibc gives a freed block of this size back at once. Left to itself it learns to keep blocks up to
# 32 MB, and the peak is of what it keeps: from 50,000 to 67,000 bytes a token by the same code.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
real = pytest.param(REAL, marks=pytest.mark.skipif(not REAL, reason="no real model"))


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("folder", [BUNDLED, real], ids=["bundled", "real"])
def test_memory_grows_by_the_cache_and_the_text_stays(folder):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, ROOT, folder],
        capture_output=True, text=True, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    for run in out["runs"]:
        assert run["same"]
        assert run["new_tokens"] == 16
        assert run["bytes_a_slot"] == out["expected"]
    short, _, long = out["runs"]
    growth = (long["peak"] - short["peak"]) / (long["length"] - short["length"])
    print(f"{out['expected']:,} bytes a token in the cache; peak memory: {growth:,.0f} a token")
    # Besides the cache: RoPE's table, and the mask of a prompt's piece, of a column for each slot.
    assert 0.9 * out["expected"] < growth < 1.25 * out["expected"] + 4 * PIECE * 4
