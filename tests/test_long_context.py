"""8,192 tokens: memory grows by the cache's bytes a token and little else, and the text is still plain decoding's."""
import json
import subprocess
import sys

import pytest

from conftest import BUNDLED, REAL, ROOT

MEASURE = r"""
import dataclasses, json, re, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from model import KVCache, load_model
from speculative import autoregressive, clasp, exact_width, prefill, DRAFT_LENGTH

model = load_model(Path(sys.argv[2]))
model.config = dataclasses.replace(model.config, max_position_embeddings=8192)
text = torch.randint(300, 4000, (8192,), generator=torch.Generator().manual_seed(0)).tolist()
peak, new = {}, 16
status = Path("/proc/self/status")
with torch.inference_mode():
    for length in (1024, 4096, 8192 - new):
        Path("/proc/self/clear_refs").write_text("5")            # the peak starts anew, loading forgotten
        cache = KVCache(model, length + new, exact_width(model, DRAFT_LENGTH + 1))
        prefill(model, cache, text[:length - 2])
        first = list(autoregressive(model, text[:length], new, width=DRAFT_LENGTH + 1, cache=cache))
        cache.length = length - 2                      # back to the prompt
        second = list(clasp(model, text[:length], new, cache=cache))
        bytes_a_slot = sum(x.nbytes for x in cache.keys + cache.values) / cache.keys[0].shape[2]
        del cache
        peak[length] = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        assert first == second and len(first) == new
c = model.config
print(json.dumps({"peak": peak, "bytes_a_slot": bytes_a_slot,
                  "expected": 2 * 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("folder", [BUNDLED, pytest.param(REAL, marks=pytest.mark.skipif(not REAL, reason="no real model"))],
                         ids=["bundled", "real"])
def test_memory_grows_by_the_cache(folder):
    done = subprocess.run([sys.executable, "-c", MEASURE, ROOT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["bytes_a_slot"] == out["expected"]
    (short, less), (_, _), (long, more) = [(int(n), bytes_) for n, bytes_ in out["peak"].items()]
    growth = (more - less) / (long - short)
    print(f"{out['expected']:,} bytes a token in the cache; peak memory grew by {growth:,.0f} bytes a token")
    # besides the cache: RoPE's table, and a prompt's piece of 512 rows has a mask of as many columns as there are slots
    assert 0.9 * out["expected"] < growth < 1.25 * out["expected"] + 4 * 512 * 4
