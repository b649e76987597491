"""Make the golden files: logits of `transformers`, for model.py to be held against.

    pip install transformers
    python tests/golden/make.py [FOLDER OF SMOLLM2]

Five tiny random models, one folder each, together cover what a config.json can vary. With a folder
made by tools/gguf_to_safetensors.py (--dtype float32) the logits of SmolLM2-135M-Instruct are made
too: every 256th column of them, since the whole is large.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
SHARDED = "sharded-old-names"
MODELS = {
    "gqa-untied": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
    },
    "mha-tied": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN,
    },
    "llama3-rope": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
    "head-dim": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
    },
    SHARDED: {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
}
COLUMNS = 256                 # of a real model's logits every so many are kept


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (rows,) -> (rows, vocabulary)."""
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def random_model(fields: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **fields)).float().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def spell_as_before(path: Path):
    """RoPE's fields in a config.json as they were spelt before transformers 5."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_tiny(name: str):
    folder = HERE / name
    model = random_model(MODELS[name])
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "1GB")
    (folder / "generation_config.json").unlink()
    if name == SHARDED:
        spell_as_before(folder / "config.json")
    tokens = torch.randint(61, (48,))
    save_file({"tokens": tokens, "logits": logits_of(model, tokens)}, folder / "expected")


def make_real(folder: str):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(49152, (40,), generator=random)
    logits = logits_of(model, tokens)[:, ::COLUMNS].contiguous()
    save_file({"tokens": tokens, "logits": logits}, HERE / "smollm2.expected")


def main():
    for name in MODELS:
        make_tiny(name)
    if len(sys.argv) > 1:
        make_real(sys.argv[1])


if __name__ == "__main__":
    main()
