"""Turn a LLaMA GGUF file into a folder for `generate.py --model`.

    pip install gguf
    python tools/gguf_to_safetensors.py model.gguf OUT [--dtype bfloat16]

Whatever quantisation the `gguf` package can undo becomes plain weights (larger on disk, and no
better than the quantised ones were). The folder is built beside OUT and takes its name when it is
complete.
"""
import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from common import run_tool  # which lets the project's own modules be found
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from checkpoint import read_headers
from generate import Parser
from model import Config, ModelError, inverse_frequencies

SHARD_BYTES = 4 << 30         # of a file of weights, at most
NATIVE = "I"                  # the gguf package's name for this machine's byte order


def refuse(message: str) -> NoReturn:
    print(f"gguf_to_safetensors.py: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- config.json

# field(name) reads one field of the file's metadata; field(name, default) where it may be missing.
Field = Callable

# Of the only RoPE scaling that GGUF files of LLaMA carry, as a tensor of divisors: LLaMA 3.1's.
SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def size(field: Field, name: str, *default) -> int:
    """A field that is one whole number above 0. Some models have one for each layer: no LLaMA."""
    value = field(name, *default)
    if type(value) is not int or value < 1:            # True is an int too
        refuse(f"{name} is not a whole number above 0")
    return value


def require_whole(field: Field, byte_order: str):
    """Refuse what is not a LLaMA in this machine's byte order, or only a part of one."""
    architecture = field("general.architecture")
    if architecture != "llama":
        refuse(f"the architecture is {architecture!r}, not 'llama'")
    if byte_order != NATIVE:
        refuse("its numbers have another byte order than this machine's")
    count = field("split.count", 1)
    if count not in (0, 1):
        refuse(f"this is part {field('split.no', 0) + 1} of a model in {count} files: join them "
               "first, as with llama-gguf-split --merge")


def read_config(field: Field, tensors: dict) -> dict:
    """config.json from the metadata."""
    if "token_embd.weight" not in tensors:
        refuse("there are no weights in this file")
    heads = size(field, "llama.attention.head_count")
    dim = size(field, "llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": size(field, "llama.feed_forward_length"),
        "num_hidden_layers": size(field, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size(field, "llama.attention.head_count_kv", heads),
        "head_dim": size(field, "llama.attention.key_length", dim // heads),
        "max_position_embeddings": size(field, "llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": field("tokenizer.ggml.eos_token_id", None),
    }
    if not field("llama.attention.causal", True):
        refuse("attention that sees later tokens is not supported")
    if field("llama.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        refuse("rotating only a part of each head is not supported")
    # A factor without a type is of a linear scaling, as is scale_linear, its name in old files.
    factor = field("llama.rope.scaling.factor", field("llama.rope.scale_linear", 0))
    scaling_type = field("llama.rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    if scaling_type != "none":
        refuse(f"unsupported RoPE scaling {scaling_type!r}")
    if "rope_freqs.weight" in tensors:
        divisors = torch.tensor(tensors["rope_freqs.weight"].data).float()
        config["rope_scaling"] = recognise_scaling(config, divisors)
    return config


def recognise_scaling(config: dict, divisors: torch.Tensor) -> dict:
    """The fields of LLaMA 3.1's rule that gives these divisors (head_dim / 2,) of frequencies."""
    scaling = SCALING | {"factor": float(divisors.max())}
    known = {name: config[name] for name in Config.__dataclass_fields__}
    plain = Config(**known | {"rope_scaling": None})
    scaled = Config(**known | {"rope_scaling": scaling})
    ratio = inverse_frequencies(plain) / inverse_frequencies(scaled)
    if ratio.shape != divisors.shape or not torch.allclose(ratio, divisors, rtol=1e-4):
        refuse("rope_freqs.weight is not LLaMA 3.1's frequency scaling")
    return scaling


# ---------------------------------------------------------------------------- tokenizer

# LLaMA 3's: contractions, words, up to three digits, punctuation, white space.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNKNOWN = 2                   # types of tokens in GGUF
CONTROL = 3
USER_DEFINED = 4


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before byte-pair merging, by GGUF's name for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "gpt-2": [byte_level],
    }
    if name not in known:
        refuse(f"unsupported pre-tokenizer {name!r} (supported: {', '.join(known)})")
    return pre_tokenizers.Sequence(known[name])


def read_tokenizer(field: Field) -> Tokenizer:
    """tokenizer.json from the metadata: byte-level BPE ("gpt2"), or SentencePiece BPE ("llama")."""
    kind = field("tokenizer.ggml.model")
    tokens = field("tokenizer.ggml.tokens")
    if kind == "gpt2":
        tokenizer = byte_level_tokenizer(field, tokens)
    elif kind == "llama":
        tokenizer = sentencepiece_tokenizer(field, tokens)
    else:
        refuse(f"unsupported tokenizer {kind!r}")
    tokenizer.add_special_tokens(added_tokens(field, UNKNOWN, CONTROL))
    tokenizer.add_tokens(added_tokens(field, USER_DEFINED))
    if adds_begin(field):
        number = field("tokenizer.ggml.bos_token_id")
        begin = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, number)])
    return tokenizer


def byte_level_tokenizer(field: Field, tokens: list[str]) -> Tokenizer:
    name = field("tokenizer.ggml.pre")                     # early files lack it; nobody can know
    cut = pre_tokenizer(name)
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    bpe = models.BPE(numbered(tokens), merges, ignore_merges=name == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(field: Field, tokens: list[str]) -> Tokenizer:
    merges = implied_merges(tokens, field("tokenizer.ggml.scores"))
    unknown = tokens[field("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(
        numbered(tokens), merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    normalizing = [normalizers.Replace(" ", "▁")]
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if field("tokenizer.ggml.add_space_prefix", True):
        normalizing.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalizing)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def implied_merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Any two pieces that make a piece, the best first: GGUF stores no merges of this kind.

    Where all scores are the same, as some files have them, pieces are as good as they come first.
    """
    vocabulary = numbered(tokens)
    merges = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                order = (-scores[i], i, vocabulary[left], vocabulary[right])
                merges.append((order, (left, right)))
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def added_tokens(field: Field, *wanted: int) -> list[AddedToken]:
    """Those of the wanted types. What ends a turn is special, whatever the file says."""
    tokens = field("tokenizer.ggml.tokens")
    types = [CONTROL if token in ENDS_OF_TURNS else given
             for token, given in zip(tokens, field("tokenizer.ggml.token_type"))]
    return [
        AddedToken(token, special=given != USER_DEFINED, normalized=False)
        for token, given in zip(tokens, types)
        if given in wanted
    ]


def adds_begin(field: Field) -> bool:
    """If the file does not say, SentencePiece vocabularies and LLaMA 3's begin with BOS."""
    is_sentencepiece = field("tokenizer.ggml.model") == "llama"
    is_llama3 = field("tokenizer.ggml.pre", "") == "llama-bpe"
    return field("tokenizer.ggml.add_bos_token", is_sentencepiece or is_llama3)


# ---------------------------------------------------------------------------- weights

# GGUF's names of what a layer has, and Hugging Face's.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name in OUTER:
        return OUTER[name]
    block, number, kind, *rest = name.split(".") + [""] * 3
    if block != "blk" or kind not in NAMES or "".join(rest) != "weight":
        refuse(f"unexpected tensor {name}: not a plain LLaMA (biases, experts and fused "
               "projections are not supported)")
    return f"model.layers.{number}.{NAMES[kind]}.weight"


def read_weight(tensor, config: dict, dequantize: Callable, dtype: torch.dtype) -> torch.Tensor:
    """Dequantised.

    GGUF stores the rows of q and k for interleaved RoPE, which pairs dimensions 2i and 2i+1 of a
    head; here they come in Hugging Face's order, which pairs i and i + head_dim/2.
    """
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = None
    if "attn_q." in tensor.name:
        heads = config["num_attention_heads"]
    elif "attn_k." in tensor.name:
        heads = config["num_key_value_heads"]
    if heads is not None:
        pairs = weight.unflatten(0, (heads, config["head_dim"] // 2, 2))
        weight = pairs.transpose(1, 2).flatten(0, 2)
    return weight.to(dtype).contiguous()


def shards_of(tensors: dict, names: list[str], dtype: torch.dtype) -> list[list[str]]:
    """The names, divided into files of at most SHARD_BYTES, or of one tensor if that is larger."""
    shards = [[]]
    room = SHARD_BYTES
    for name in names:
        size = int(tensors[name].n_elements) * dtype.itemsize
        if room < size and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def shard_file(number: int, shards: int) -> str:
    if shards == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{shards:05d}.safetensors"


def write_weights(folder: Path, names: dict[str, str], tensors: dict, dtype, read: Callable):
    """All files of weights, and the index of several. names: GGUF's to Hugging Face's.

    read(tensor): its weight.
    """
    shards = shards_of(tensors, list(names), dtype)
    files = {}                                             # by Hugging Face's name
    for number, shard in enumerate(shards, 1):
        file = shard_file(number, len(shards))
        weights = {}
        for name in shard:
            files[names[name]] = file
            show_progress(len(files), len(names), name)
            weights[names[name]] = read(tensors[name])
        save_file(weights, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": files}
        write_json(folder / "model.safetensors.index.json", index)


def show_progress(done: int, total: int, name: str):
    if sys.stderr.isatty():
        print(f"\r{done}/{total} {name:40s}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the folder

def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Tokens that end a turn in a chat. Files made before GGUF had a field for that do not name theirs.
ENDS_OF_TURNS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def generation_config(field: Field) -> dict:
    """Tokens that end an answer: those that the file names, and what ends turns elsewhere."""
    named = [field(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot")]
    known = [i for i, token in enumerate(field("tokenizer.ggml.tokens")) if token in ENDS_OF_TURNS]
    return {"eos_token_id": sorted({i for i in [*named, *known] if i is not None})}


def tokenizer_config(field: Field, config: dict) -> dict:
    tokens = field("tokenizer.ggml.tokens")
    found = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_begin(field)}
    for name in ("bos", "eos"):
        number = config[f"{name}_token_id"]
        if number is not None:
            found[f"{name}_token"] = tokens[number]
    template = field("tokenizer.chat_template", None)
    if template:
        found["chat_template"] = template
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser.parse_args()


def build_folder(out: Path, fill: Callable):
    """Make a folder beside ``out``, let fill(folder) write into it, and give it its name.

    If that fails, nothing of it is left.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        building.chmod(0o755)                # mkdtemp's folders are for their owner alone
        fill(building)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def require_loadable(folder: Path):
    """Refuse what generate.py would, as a file without some of the weights."""
    try:
        read_headers(folder)
    except ModelError as error:
        refuse(f"what it holds is no LLaMA: {error}".replace(str(folder), "the folder made of it"))


def open_reader(gguf, path: Path):
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, LookupError) as error:
        refuse(f"{path} cannot be read as GGUF: {error}")


def main():
    args = arguments()
    try:
        import gguf
    except ImportError:
        refuse("this tool needs the gguf package: pip install gguf")
    if args.out.exists():
        refuse(f"{args.out} exists already")
    reader = open_reader(gguf, args.gguf)

    @cache                                             # vocabularies are long, and asked for thrice
    def field(name: str, *default):
        if name in reader.fields:
            return reader.fields[name].contents()
        if not default:
            refuse(f"{args.gguf} has no field {name}")
        return default[0]

    try:
        require_whole(field, reader.byte_order)
    except ValueError as error:                            # a text that is no UTF-8
        refuse(f"{args.gguf} is damaged: {error}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(field, tensors) | {"dtype": args.dtype}
    try:
        tokenizer = read_tokenizer(field)
        its_config = tokenizer_config(field, config)
        ends = generation_config(field)
    except Exception as error:                         # the library raises bare Exception
        reason = " ".join(str(error).split())          # one line
        refuse(f"{args.gguf}: its tokenizer is damaged ({reason})")
    names = {name: hugging_face_name(name) for name in tensors if name != "rope_freqs.weight"}
    json_files = {
        "config.json": config,
        "generation_config.json": ends,
        "tokenizer_config.json": its_config,
    }
    dtype = getattr(torch, args.dtype)

    def read(tensor) -> torch.Tensor:
        return read_weight(tensor, config, gguf.dequantize, dtype)

    def fill(folder: Path):
        write_weights(folder, names, tensors, dtype, read)
        for file, value in json_files.items():
            write_json(folder / file, value)
        tokenizer.save(str(folder / "tokenizer.json"))
        require_loadable(folder)

    try:
        build_folder(args.out, fill)
    except (NotImplementedError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        refuse(f"{args.gguf} cannot be converted: {error}")
    print(f"\rwrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_tool("gguf_to_safetensors.py", main))
