"""Make the golden files: logits of `transformers`' LlamaForCausalLM, for model.py to be held against.

    pip install transformers
    python tests/golden/make.py [FOLDER OF SMOLLM2]

Five tiny random models, one folder each, together cover what a config.json can vary. With a folder made by
tools/gguf_to_safetensors.py (--dtype float32) the logits of SmolLM2-135M-Instruct are made too: every
256th column of them, since the whole is large.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "gqa-untied": dict(num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=PLAIN),
    "mha-tied": dict(num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=PLAIN),
    "llama3-rope": dict(num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "head-dim": dict(num_key_value_heads=2, head_dim=12, tie_word_embeddings=False, rope_parameters=PLAIN),
    "sharded-old-names": dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3),
}


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def main():
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                             max_position_embeddings=128, initializer_range=0.3, rms_norm_eps=1e-5, **fields)
        model = LlamaForCausalLM(config).float().eval()
        for norm in (p for n, p in model.named_parameters() if "norm" in n):
            torch.nn.init.uniform_(norm, 0.5, 1.5)
        sharded = name.startswith("sharded")
        model.save_pretrained(HERE / name, max_shard_size="40KB" if sharded else "1GB")
        (HERE / name / "generation_config.json").unlink()
        if sharded:                                    # RoPE's fields as they were spelt before transformers 5
            path = HERE / name / "config.json"
            config = json.loads(path.read_text())
            rope = config.pop("rope_parameters")
            config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
            path.write_text(json.dumps(config, indent=2) + "\n")
        tokens = torch.randint(61, (48,))
        save_file({"tokens": tokens, "logits": logits_of(model, tokens)}, HERE / name / "expected")
    if len(sys.argv) > 1:
        model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
        tokens = torch.randint(49152, (40,), generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens, "logits": logits_of(model, tokens)[:, ::256].contiguous()}, HERE / "smollm2.expected")


if __name__ == "__main__":
    main()
