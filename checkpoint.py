"""What a Hugging Face folder holds, and how it becomes a model and a tokenizer.

    config.json                  the model's shape                              read_config
    *.safetensors                its weights, by name                           load_model
    tokenizer.json               text to token ids and back                     Tokenizer
    tokenizer_config.json        special tokens, the chat template              Tokenizer
    chat_template.jinja          the same, in a file of its own                 Tokenizer
    generation_config.json       stop tokens; settings for CLaSp that suit it   stop_tokens, ...

Whatever would come out wrong is refused by name (ModelError, one line).
"""
import json
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Llama, ModelError

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "fairy-tales"
FILES = [                     # of a repository, what is downloaded
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]


# ---------------------------------------------------------------------------- finding it

def find_folder(name: str) -> Path:
    """A folder as it is; a Hugging Face repo id ("owner/name") is downloaded, or found in its cache."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, RuntimeError) as error:       # not allowed to look, name too long, ~nobody
        raise ModelError(f"no folder {name} ({error})") from None
    like_a_path = name.startswith((".", "/", "~")) or name.endswith("/")
    if exists or like_a_path or name.count("/") != 1:
        raise ModelError(f"no folder {name}: --model takes a folder or a Hugging Face repo id, "
                         "owner/name")
    return download(name)


def download(name: str) -> Path:
    """A repository's files in Hugging Face's cache; its config.json first, before gigabytes follow."""
    from huggingface_hub import errors, snapshot_download       # a second to import
    try:
        read_config(Path(snapshot_download(name, allow_patterns=["config.json"])))
        return Path(snapshot_download(name, allow_patterns=FILES))
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(f"{name} is gated: accept its licence at huggingface.co, then log in with "
                         "`hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"{name} is neither a folder nor a model on huggingface.co (if private: "
                         "`hf auth login`)") from None
    except Exception as error:                     # its network layers raise many unrelated types
        raise ModelError(f"{name} is not a folder here and could not be downloaded "
                         f"({type(error).__name__}): check the network and HF_HUB_OFFLINE, or pass "
                         "a folder") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} if there is none. Raises ModelError if it is something else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


# ---------------------------------------------------------------------------- config.json

SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
]
LLAMA3_SCALING = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
]


def read_config(folder: Path) -> Config:
    """config.json -> Config. Refuses, by name, whatever model.py would compute wrongly."""
    path = folder / "config.json"
    raw = read_json(path)
    if not raw:
        raise ModelError(f"{path} is missing or empty: a model folder holds config.json, "
                         "*.safetensors, tokenizer.json")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}     # new name, old name
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: the RoPE fields are no object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse_other_architectures(path, raw, rope_type)
    try:
        scaling = None
        if rope_type == "llama3":
            scaling = {name: float(rope[name]) for name in LLAMA3_SCALING}
        return Config(
            **read_sizes(raw),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    except KeyError as error:
        raise ModelError(f"{path}: the field {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: {error}") from None


def refuse_other_architectures(path: Path, raw: dict, rope_type: str):
    model_type = raw.get("model_type")
    activation = raw.get("hidden_act", "silu")
    checks = [
        (model_type == "llama", f"model_type {model_type!r}, not 'llama'"),
        (not raw.get("attention_bias"), "attention biases"),
        (not raw.get("mlp_bias"), "MLP biases"),
        (activation == "silu", f"activation {activation!r}, not 'silu'"),
        (raw.get("partial_rotary_factor", 1) == 1, "rotating only a part of each head"),
        (not raw.get("quantization_config"), "quantised weights"),
        (rope_type in ("default", "llama3"), f"rope_type {rope_type!r}, not 'default' or 'llama3'"),
    ]
    for supported, what in checks:
        if not supported:
            raise ModelError(f"{path}: unsupported: {what}")


def read_sizes(raw: dict) -> dict[str, int]:
    sizes = {name: raw[name] for name in SIZES}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    sizes["head_dim"] = raw.get("head_dim") or sizes["hidden_size"] // heads
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise ValueError(f"sizes must be positive integers, not {sizes}")
    if heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise ValueError("key-value heads must divide the heads, and head_dim must be even")
    return sizes


# ---------------------------------------------------------------------------- *.safetensors

def named_weights(model: Llama) -> dict[str, Tensor]:
    """Hugging Face's tensor names -> views of the model's weights, to be filled or saved."""
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
    }
    if model.head is not None:
        weights["lm_head.weight"] = model.head.weight
    c = model.config
    q_size = c.num_attention_heads * c.head_dim
    kv_size = c.num_key_value_heads * c.head_dim
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv.weight.split((q_size, kv_size, kv_size))
        gate, up = layer.gate_up.weight.chunk(2)
        parts = {
            "input_layernorm": layer.attention_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": view for name, view in parts.items()}
    return {name: view.detach() for name, view in weights.items()}


def load_model(folder: Path, device="cpu", dtype=torch.float32) -> Llama:
    """The model of a Hugging Face folder, on a device and in a dtype, ready for inference.

    Tensors are read from the memory-mapped files one by one, so the weights are never held twice.
    Raises ModelError for a missing, damaged or unsupported config.json or weight file, and for
    missing, unknown and wrongly shaped tensors.
    """
    model = empty_model(read_config(folder), device, dtype)
    wanted = named_weights(model)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    if not is_redundant(name, model):
                        fill(wanted, name, tensors.get_tensor(name), path)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or truncated ({error})") from None
    if wanted:
        others = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        raise ModelError(f"{folder}: no weights for {next(iter(wanted))}{others}")
    return model


def empty_model(config: Config, device="cpu", dtype=torch.float32) -> Llama:
    """A model whose weights have memory but no values yet."""
    with torch.device("meta"):
        model = Llama(config)                          # no memory yet
    # What ``to_empty`` does; but that would import torch._dynamo, for half a second.
    model._apply(lambda weight: torch.empty(weight.shape, dtype=dtype, device=device))
    return model.requires_grad_(False).eval()


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that an index names."""
    path = folder / "model.safetensors.index.json"
    index = read_json(path)
    if not index:
        return [folder / "model.safetensors"]
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ModelError(f"{path}: no weight_map from names to files")
    return [folder / file for file in sorted(set(shards.values()))]


def is_redundant(name: str, model: Llama) -> bool:
    """Is a tensor derived from the config, or a tied head, which is the embedding?"""
    tied_head = name == "lm_head.weight" and model.head is None
    return tied_head or name.endswith("rotary_emb.inv_freq")


def fill(wanted: dict[str, Tensor], name: str, tensor: Tensor, path: Path):
    """Copy a tensor to its place, which is then no longer wanted."""
    if name not in wanted:
        raise ModelError(f"{path}: unexpected tensor {name} (seen twice, or not a plain LLaMA?)")
    place = wanted.pop(name)
    if tensor.shape != place.shape or not tensor.is_floating_point():
        raise ModelError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, config.json "
                         f"implies floats {tuple(place.shape)}")
    place.copy_(tensor)


# ---------------------------------------------------------------------------- text

class Tokenizer:
    """A folder's tokenizer, chat template and stop tokens."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Library
        try:
            self.library = Library.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                     # the library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: missing or unreadable "
                             f"({error})") from None
        self.library.no_truncation()                   # some files carry training's settings
        self.library.no_padding()
        self.folder = folder
        self.config = read_json(folder / "tokenizer_config.json")
        self.special = special_tokens(self.config)
        self.stop = stop_tokens(folder)

    def encode(self, prompt: str | list[str], chat: bool = False) -> list[int]:
        """Token ids of a text, or of a conversation's turns.

        Begin-of-text comes from the chat template, or as the tokenizer's files say.
        """
        turns = [prompt] if isinstance(prompt, str) else prompt
        if chat:
            return self.library.encode(self.render(turns), add_special_tokens=False).ids
        add_begin = self.config.get("add_bos_token")   # unset: tokenizer.json's own rule holds
        ids = self.library.encode(" ".join(turns), add_special_tokens=add_begin is not False).ids
        begin = self.library.token_to_id(self.special.get("bos_token", ""))
        if add_begin and begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=True)

    def stream(self, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """The text that each token adds, "" while a character is still in pieces.

        A token's text depends on those before it, so a few of them are decoded with it and taken
        off again. (tokenizers' DecodeStream raises on some byte sequences.)
        """
        ids = list(prompt)
        shown = len(prompt)                            # of ids, those whose text is out
        start = max(0, shown - 5)                      # where decoding begins
        for token in tokens:
            ids.append(token)
            before = self.decode(ids[start:shown])
            now = self.decode(ids[start:])
            if len(now) > len(before) and not now.endswith("\ufffd"):    # U+FFFD: half a character
                start, shown = shown, len(ids)
                yield now[len(before):]
            else:
                yield ""

    @property
    def has_chat_template(self) -> bool:
        return bool(self.config.get("chat_template")) or self.template_file.exists()

    @property
    def template_file(self) -> Path:
        return self.folder / "chat_template.jinja"

    def render(self, turns: list[str]) -> str:
        """The user's and the model's messages in turn, in the model's own chat template."""
        roles = cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
        try:
            template = self.chat_template()
            if template:
                return sandbox().from_string(template).render(
                    messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:                     # a template is a program, and may fail
            raise ModelError(f"{self.folder}: the chat template failed: {error}") from None
        raise ModelError(f"{self.folder} has no chat template: leave out --chat")

    def chat_template(self) -> str | None:
        if self.template_file.exists():
            return self.template_file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):                 # several, by name
            return {t["name"]: t["template"] for t in template}.get("default")
        return template


def sandbox():
    """Where a chat template, which is somebody's program, may run: jinja2's sandbox."""
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, **options):
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return environment


def special_tokens(config: dict) -> dict[str, str]:
    """By name, as a chat template wants them. Each is written as a string or as an object."""
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if token:
            special[name] = str(token.get("content") if isinstance(token, dict) else token)
    return special


def stop_tokens(folder: Path) -> set[int]:
    """Ids that end a text: an id or a list, from the first file that names any."""
    for file in ("generation_config.json", "config.json"):
        ids = read_json(folder / file).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) for i in ids):
            raise ModelError(f"{folder / file}: eos_token_id is neither a token id nor a list of "
                             "them")
        return set(ids)
    return set()


# ---------------------------------------------------------------------------- settings

# What "clasp" in a generation_config.json may hold, and of which type.
SUGGESTIBLE = {
    "skip_layers": int,
    "draft_length": int,
    "exit_threshold": int | float,
    "opt_interval": int,
}


def suggested_settings(folder: Path | None) -> dict:
    """The settings of CLaSp that a model suggests for itself, if any."""
    if folder is None:
        return {}
    path = folder / "generation_config.json"
    suggested = read_json(path).get("clasp", {})
    known = isinstance(suggested, dict) and suggested.keys() <= SUGGESTIBLE.keys()
    if not known or not all(isinstance(value, SUGGESTIBLE[name])
                            for name, value in suggested.items()):
        raise ModelError(f"{path}: clasp may give {', '.join(SUGGESTIBLE)} a (whole) number, no "
                         "more")
    return suggested
