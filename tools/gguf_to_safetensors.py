"""Turn a LLaMA GGUF file into a folder for `generate.py --model`.

    pip install gguf
    python tools/gguf_to_safetensors.py model.gguf OUT [--dtype bfloat16]

Whatever quantisation the `gguf` package can undo becomes plain weights (larger on disk, and no better than
the quantised ones were). The folder is built beside OUT and takes its name when it is complete.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Config, inverse_frequencies  # noqa: E402

SHARD_BYTES = 4 << 30
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
# How text is cut before byte-pair merging, by GGUF's name for it.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {
    "llama-bpe": lambda: [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)]}
CONTROL, USER_DEFINED = 3, 4                                   # GGUF token types


def refuse(message: str):
    sys.exit(print(f"gguf_to_safetensors.py: {message}", file=sys.stderr) or 2)


def hugging_face_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    block, number, kind, suffix = (name.split(".") + [""] * 4)[:4]
    if block != "blk" or kind not in NAMES or suffix != "weight":
        refuse(f"unexpected tensor {name}: not a plain LLaMA (biases, experts and fused projections are not supported)")
    return f"model.layers.{number}.{NAMES[kind]}.weight"


def read_config(field, tensors) -> dict:
    """config.json from the metadata; llama3 RoPE scaling is stored as a tensor of divisors, and recognised."""
    if "token_embd.weight" not in tensors:
        refuse("there are no weights in this file")
    heads, dim = field("llama.attention.head_count"), field("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": dim,
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads, "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.attention.key_length", dim // heads),
        "max_position_embeddings": field("llama.context_length"), "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base", 10000.0), "rope_scaling": None,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]), "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False, "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id", None), "eos_token_id": field("tokenizer.ggml.eos_token_id", None)}
    if field("llama.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        refuse("rotating only a part of each head is not supported")
    if field("llama.rope.scaling.type", "none") != "none":
        refuse(f"unsupported RoPE scaling {field('llama.rope.scaling.type')!r}")
    if "rope_freqs.weight" in tensors:
        divisors = torch.tensor(tensors["rope_freqs.weight"].data)
        config["rope_scaling"] = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        known = {key: config[key] for key in Config.__dataclass_fields__}
        ratio = inverse_frequencies(Config(**known | {"rope_scaling": None})) / inverse_frequencies(Config(**known))
        if not torch.allclose(ratio, divisors, rtol=1e-4):
            refuse("rope_freqs.weight is not LLaMA 3.1's frequency scaling")
    return config


def read_tokenizer(field) -> Tokenizer:
    """tokenizer.json from the metadata: byte-level BPE ("gpt2"), or SentencePiece BPE ("llama")."""
    kind, tokens, types = field("tokenizer.ggml.model"), field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        pre = field("tokenizer.ggml.pre")                      # early files lack it, and then nobody can know
        if pre not in PRE_TOKENIZERS:
            refuse(f"unsupported pre-tokenizer {pre!r} (supported: {', '.join(PRE_TOKENIZERS)})")
        merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "llama":                                      # merges are implied: any two pieces that make a piece
        scores = field("tokenizer.ggml.scores")
        merges = [(scores[i], (token[:cut], token[cut:])) for token, i in vocabulary.items() for cut in range(1, len(token))
                  if token[:cut] in vocabulary and token[cut:] in vocabulary]
        merges = [pair for _, pair in sorted(merges, key=lambda m: (-m[0], vocabulary[m[1][0]], vocabulary[m[1][1]]))]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[field("tokenizer.ggml.unknown_token_id", 0)],
                                         byte_fallback=True, fuse_unk=True))
        prefix = [normalizers.Prepend("▁")] if field("tokenizer.ggml.add_space_prefix", True) else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               *[decoders.Strip(" ", 1, 0) for _ in prefix]])
    else:
        refuse(f"unsupported tokenizer {kind!r}")
    for which in (CONTROL, USER_DEFINED):
        added = [AddedToken(t, special=which == CONTROL, normalized=False) for t, type_ in zip(tokens, types) if type_ == which]
        (tokenizer.add_special_tokens if which == CONTROL else tokenizer.add_tokens)(added)
    if adds_begin(field):
        begin = tokens[field("tokenizer.ggml.bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
    return tokenizer


def adds_begin(field) -> bool:
    """If the file does not say, SentencePiece vocabularies and LLaMA 3's begin with the BOS token."""
    implied = field("tokenizer.ggml.model") == "llama" or field("tokenizer.ggml.pre", "") == "llama-bpe"
    return field("tokenizer.ggml.add_bos_token", implied)


def weight(tensor, config: dict, dequantize, dtype) -> torch.Tensor:
    """Dequantised; rows of q and k, which GGUF stores for interleaved RoPE, in Hugging Face's half-and-half order."""
    w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    for kind, heads in (("attn_q.", "num_attention_heads"), ("attn_k.", "num_key_value_heads")):
        if kind in tensor.name:
            w = w.unflatten(0, (config[heads], config["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)
    return w.to(dtype).contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    args = parser.parse_args()
    try:
        import gguf
    except ImportError:
        refuse("this tool needs the gguf package: pip install gguf")
    if args.out.exists():
        refuse(f"{args.out} exists already")
    try:
        reader = gguf.GGUFReader(args.gguf)
    except (OSError, ValueError, LookupError) as error:
        refuse(f"{args.gguf} cannot be read as GGUF: {error}")

    def field(name, *default):
        if name not in reader.fields and not default:
            refuse(f"{args.gguf} has no field {name}")
        return reader.fields[name].contents() if name in reader.fields else default[0]

    if field("general.architecture") != "llama":
        refuse(f"the architecture is {field('general.architecture')!r}, not 'llama'")
    tensors = {t.name: t for t in reader.tensors}
    config = read_config(field, tensors) | {"dtype": args.dtype}
    tokenizer, tokens = read_tokenizer(field), field("tokenizer.ggml.tokens")
    names = {name: hugging_face_name(name) for name in tensors if name != "rope_freqs.weight"}
    dtype = getattr(torch, args.dtype)

    shards, room = [[]], SHARD_BYTES
    for name in names:
        size = int(tensors[name].n_elements) * dtype.itemsize
        if room < size and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size

    stop = [field(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot")]
    special = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos")
               if config[f"{name}_token_id"] is not None}
    template = field("tokenizer.chat_template", None)
    json_files = {
        "config.json": config, "generation_config.json": {"eos_token_id": sorted({i for i in stop if i is not None})},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_begin(field), **special,
                                  **({"chat_template": template} if template else {})}}
    building = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        weight_map, done = {}, 0
        for i, shard in enumerate(shards, 1):
            file, weights = "model.safetensors", {}
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                json_files["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
            for name in shard:
                done += 1
                if sys.stderr.isatty():
                    print(f"\r{done}/{len(names)} {name:40s}", end="", file=sys.stderr, flush=True)
                weights[names[name]] = weight(tensors[name], config, gguf.dequantize, dtype)
                weight_map[names[name]] = file
            save_file(weights, building / file, metadata={"format": "pt"})
        for file, value in json_files.items():
            (building / file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tokenizer.save(str(building / "tokenizer.json"))
        building.rename(args.out)
    except (NotImplementedError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        refuse(f"{args.gguf} cannot be converted: {error}")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"\rwrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
