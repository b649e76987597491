"""What a Hugging Face folder holds, and how it becomes a model and a tokenizer.

    config.json                  the model's shape                              read_config
    *.safetensors                its weights, by name                           load_model
    tokenizer.json               text to token ids and back                     Tokenizer
    tokenizer_config.json        special tokens, the chat template              Tokenizer
    special_tokens_map.json      special tokens, in older folders               Tokenizer
    added_tokens.json            tokens that tokenizer.json lacks, in old ones  Tokenizer
    chat_template.jinja          the template, in a file of its own             Tokenizer
    generation_config.json       stop tokens; settings for CLaSp that suit it   stop_tokens, ...

Whatever model.py would compute wrongly is refused: a ModelError, one line that names what is wrong.
"""
import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import cycle
from os.path import commonprefix
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model import Config, Llama, ModelError

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "tiny-stories"
FILES = [                     # what is downloaded of a repository
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model*.safetensors",
    "pytorch_model*.safetensors",                      # as some were converted
]


# ---------------------------------------------------------------------------- finding it

def find_folder(name: str) -> Path:
    """The folder of this name; or of a Hugging Face repo id ("owner/name"), downloaded once."""
    if not name:
        raise ModelError("--model is empty: it takes a folder or a Hugging Face repo id")
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:    # forbidden, too long, no such user, NUL
        raise ModelError(f"no folder {name} ({error})") from None
    like_a_path = name.startswith((".", "/", "~")) or name.endswith("/")
    if exists or like_a_path or name.count("/") != 1:
        raise ModelError(f"no folder {name}: --model takes a folder or a Hugging Face repo id, "
                         "owner/name")
    return download(name)


def short_name(name: str) -> str:
    """What titles call such a model: by its folder or its repository, not by a cache's folder."""
    return Path(name).expanduser().resolve().name


def download(name: str) -> Path:
    """A repository's files, in Hugging Face's cache. First config.json, before gigabytes follow."""
    from huggingface_hub import errors, snapshot_download  # a second to import
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
        if not path.is_file():                         # reading a pipe would wait for ever
            raise OSError("not a file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
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


ORIGINAL_LENGTH = "original_max_position_embeddings"     # may stand in config.json itself, too


def read_config(folder: Path) -> Config:
    """config.json -> Config. Refuses, by name, whatever model.py would compute wrongly."""
    path = folder / "config.json"
    raw = read_json(path)
    if not raw:
        raise ModelError(f"{path} is missing or empty: a model folder holds config.json, "
                         "*.safetensors, tokenizer.json")
    # The new name is rope_parameters; where both are given, transformers takes the old one.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: the RoPE fields are no object")
    if ORIGINAL_LENGTH in raw:                           # it wins, as in transformers
        rope = rope | {ORIGINAL_LENGTH: raw[ORIGINAL_LENGTH]}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse_other_architectures(path, raw, rope, rope_type)
    try:
        scaling = None
        if rope_type == "llama3":
            scaling = {name: positive(name, rope[name]) for name in LLAMA3_SCALING}
            if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
                raise ValueError("high_freq_factor must be more than low_freq_factor")
        # Fields that are missing have transformers' defaults.
        theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
        return Config(
            **read_sizes(raw),
            rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            rope_theta=positive("rope_theta", theta),
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    except KeyError as error:
        raise ModelError(f"{path}: the field {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"{path}: {error}") from None


def positive(name: str, value) -> float:
    """A number as a float. Raises ValueError unless it is positive and finite."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a positive number, not {value}")
    return number


def refuse_other_architectures(path: Path, raw: dict, rope: dict, rope_type: str):
    """Raise ModelError for what is not a plain LLaMA."""
    model_type = raw.get("model_type")
    activation = raw.get("hidden_act", "silu")
    rotated = [fields.get("partial_rotary_factor", 1) for fields in (raw, rope)]
    checks = [
        (model_type == "llama", f"model_type {model_type!r}, not 'llama'"),
        (not raw.get("attention_bias"), "attention biases"),
        (not raw.get("mlp_bias"), "MLP biases"),
        (raw.get("is_causal", True), "attention that sees later tokens (is_causal false)"),
        (activation == "silu", f"activation {activation!r}, not 'silu'"),
        (rotated == [1, 1], "rotating only a part of each head"),
        (not raw.get("quantization_config"), "quantised weights"),
        (rope_type in ("default", "llama3"), f"rope_type {rope_type!r}, not 'default' or 'llama3'"),
    ]
    for supported, what in checks:
        if not supported:
            raise ModelError(f"{path}: unsupported: {what}")


def read_sizes(raw: dict) -> dict[str, int]:
    """The sizes of a Config. Raises KeyError or ValueError for those that cannot be."""
    sizes = {name: raw[name] for name in SIZES}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    sizes["head_dim"] = raw.get("head_dim") or sizes["hidden_size"] // heads
    if not all(type(size) is int and size > 0 for size in sizes.values()):     # True is an int too
        raise ValueError(f"sizes must be positive integers, not {sizes}")
    if heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise ValueError("key-value heads must divide the heads, and head_dim must be even")
    return sizes


# ---------------------------------------------------------------------------- *.safetensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# By module of a decoder layer: the tensors that Hugging Face keeps it as, one below another.
LAYER_PARTS = {
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
LOADERS = 4                   # matrices that are in the making at once, at most
FLOATS = {                    # safetensors' dtypes, and their bytes; fp8 would need its scales
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}


class Whole:
    """What one process holds of a model: all. Of several, each holds a part: extras/shares.py."""

    def config(self, config: Config) -> Config:
        return config

    def of_tensor(self, config: Config, name: str) -> slice:
        return slice(None)


class Part(NamedTuple):
    """A module's weight, and the tensors in files that it is made of, one below another."""
    module: str               # "layers.3.qkv"
    names: list[str]          # "model.layers.3.self_attn.q_proj.weight", ...
    rows: list[int]           # of each


class Stored(NamedTuple):
    """A tensor in a file."""
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str                # "BF16", ...

    @property
    def weight_bytes(self) -> int:
        return FLOATS[self.dtype]


def parts(model: Llama) -> list[Part]:
    """All weights of a model; first embedding and head, the largest."""
    c = model.config
    found = [Part("embed", [EMBEDDING], [c.vocab_size])]
    if model.head is not None:
        found.append(Part("head", [HEAD], [c.vocab_size]))
    found.append(Part("norm", ["model.norm.weight"], [c.hidden_size]))
    q_rows = c.num_attention_heads * c.head_dim
    kv_rows = c.num_key_value_heads * c.head_dim
    rows = {
        "attention_norm": [c.hidden_size],
        "qkv": [q_rows, kv_rows, kv_rows],
        "o": [c.hidden_size],
        "mlp_norm": [c.hidden_size],
        "gate_up": [c.intermediate_size, c.intermediate_size],
        "down": [c.hidden_size],
    }
    for i in range(c.num_hidden_layers):
        for module, names in LAYER_PARTS.items():
            names = [f"model.layers.{i}.{name}.weight" for name in names]
            found.append(Part(f"layers.{i}.{module}", names, rows[module]))
    return found


def named_weights(model: Llama) -> dict[str, Tensor]:
    """Hugging Face's tensor names -> views of the model's weights, to be looked at or saved."""
    weights = {}
    for part in parts(model):
        weight = model.get_submodule(part.module).weight.detach()
        weights |= zip(part.names, weight.split(part.rows))
    return weights


def read_headers(folder: Path) -> tuple[Config, dict[str, Stored]]:
    """What a folder's files say that they hold, which is a model. No weights are read.

    (But for a head beside the embedding that it is tied to: are the two equal?)

    Raises ModelError for a missing, damaged or unsupported config.json or weight file, and for
    missing, unknown and wrongly shaped tensors.
    """
    config = read_config(folder)
    files = weight_files(folder)
    stored = stored_tensors(files)
    refuse_impossible_sizes(folder, config, files)
    is_tied = config.tie_word_embeddings and not has_its_own_head(stored)
    if is_tied and HEAD in stored:                                   # files may name it either way
        head = stored.pop(HEAD)
        stored.setdefault(EMBEDDING, head)
    config = replace(config, tie_word_embeddings=is_tied)
    with torch.device("meta"):                                       # no memory yet
        require_parts(Llama(config), stored, folder)
    return config, stored


def unchanged(linear: nn.Module) -> nn.Module:
    return linear


def load_model(
    folder: Path | str,
    device="cpu",
    dtype=torch.float32,
    form: Callable[[nn.Module], nn.Module] = unchanged,
    share=Whole(),
) -> Llama:
    """The model of a Hugging Face folder, on a device and in a dtype, ready for inference.

    form(linear): what a matrix is kept as (packed, in eight bits, ...). It is called as soon as the
    matrix's weights are there, with nn.Linear; and for a head that is tied, with the embedding.
    share: read only what this process holds.

    Matrix by matrix the tensors are read from the memory-mapped files, cast and put into their
    form, some at a time, side by side. So the model never exists twice, nor in another form.
    Raises ModelError before that, see ``read_headers``.
    """
    config, stored = read_headers(Path(folder))
    with torch.device("meta"):                                       # no memory yet
        model = Llama(share.config(config))

    def load(part: Part):
        module = model.get_submodule(part.module)
        weight = torch.empty(module.weight.shape, dtype=dtype, device=device)
        for name, place in zip(part.names, weight.split(part.rows)):
            read_into(place, stored[name], share.of_tensor(config, name))
        module.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module, nn.Linear):
            model.set_submodule(part.module, form(module))
        if module is model.embed and config.tie_word_embeddings:
            head = form(module)
            model.head = head if head is not module else None

    side_by_side(load, parts(model))
    return model.requires_grad_(False).eval()


def side_by_side(work: Callable, items: list):
    """Call ``work`` with each item, a few at a time; with a progress bar, on a terminal, from 2 s.

    An error, or Ctrl-C, ends it after the items that are begun.
    """
    from tqdm import tqdm  # comes with huggingface-hub
    threads = ThreadPoolExecutor(min(LOADERS, torch.get_num_threads()))
    hidden = None if sys.stderr else True              # None: shown on a terminal
    try:
        done = threads.map(work, items)
        for _ in tqdm(done, "loading", len(items), leave=False, delay=2, disable=hidden):
            pass
    finally:
        threads.shutdown(cancel_futures=True)


def read_into(place: Tensor, stored: Stored, part):
    """Copy a tensor from its file, or a part of it: an index.

    The file is opened for each tensor, so that what is mapped of it does not count as used memory
    for long.
    """
    with opened(stored.path) as tensors:
        place.copy_(tensors.get_slice(stored.name)[part])


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors; if there is none, the files that an index names."""
    single = folder / "model.safetensors"
    path = folder / "model.safetensors.index.json"
    index = read_json(path)
    if single.exists() or not index:
        return [single]
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ModelError(f"{path}: no weight_map from names to files")
    for file in shards.values():
        if Path(file).name != file:
            raise ModelError(f"{path}: names the file {file}, which is not in this folder")
    return [folder / file for file in sorted(set(shards.values()))]


@contextmanager
def opened(path: Path):
    """A file of tensors, memory-mapped. Raises ModelError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a file")
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:      # ValueError: a name that cannot be
        raise ModelError(f"{path}: damaged or truncated ({error})") from None


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """What the files hold, by name; but not RoPE's frequencies, which the config implies."""
    found = {}
    for path in files:
        with opened(path) as tensors:
            for name in tensors.keys():
                header = tensors.get_slice(name)
                if name in found:
                    raise ModelError(f"{path}: the tensor {name} is in another file too")
                if not name.endswith("rotary_emb.inv_freq"):
                    found[name] = Stored(path, name, tuple(header.get_shape()), header.get_dtype())
    return found


def has_its_own_head(stored: dict[str, Stored]) -> bool:
    """Is a head stored, other than the embedding? It may be, though the config ties them."""
    if HEAD not in stored or EMBEDDING not in stored:
        return False
    head, embedding = stored[HEAD], stored[EMBEDDING]
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return True
    with opened(head.path) as a, opened(embedding.path) as b:
        return not torch.equal(a.get_tensor(HEAD), b.get_tensor(EMBEDDING))


def require_parts(model: Llama, stored: dict[str, Stored], folder: Path):
    """Refuse files that hold other tensors than the model has, or of other shapes."""
    missing = []
    unexpected = dict(stored)
    for part in parts(model):
        width = model.get_submodule(part.module).weight.shape[1:]
        for name, rows in zip(part.names, part.rows):
            if name not in stored:
                missing.append(name)
            else:
                require_floats(name, unexpected.pop(name), (rows, *width))
    if unexpected:
        name = next(iter(unexpected))
        raise ModelError(f"{stored[name].path}: unexpected tensor {name} (not a plain LLaMA?)")
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder}: no weights for {missing[0]}{others}")


def require_floats(name: str, tensor: Stored, shape: tuple[int, ...]):
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise ModelError(f"{tensor.path}: {name} is {tensor.dtype} {tensor.shape}, config.json "
                         f"implies floats of at least 16 bits {shape}")


def refuse_impossible_sizes(folder: Path, config: Config, files: list[Path]):
    """Before memory is asked for: do the files hold as many bytes as the config implies weights?"""
    embedding = config.vocab_size * config.hidden_size
    weights = config.num_hidden_layers * config.layer_weights + embedding
    stored = sum(path.stat().st_size for path in files)
    if weights > stored:
        shown = f"{weights:,}" if weights < 1e15 else "too many"   # more digits than a float has
        raise ModelError(f"{folder / 'config.json'}: its sizes imply {shown} weights, and the "
                         f"weight files have {stored:,} bytes")


# ---------------------------------------------------------------------------- text

BROKEN = "\ufffd"             # what a decoder writes for bytes that are not (yet) a character
TOKEN_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
TEMPLATE_SECONDS = 5          # a chat template that takes longer never ends


class Tokenizer:
    """A folder's tokenizer, chat template and stop tokens."""

    def __init__(self, folder: Path | str):
        from tokenizers import Tokenizer as Library
        folder = Path(folder)
        try:
            if not (folder / "tokenizer.json").is_file():
                raise OSError("no such file")
            self.library = Library.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                     # the library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: missing or unreadable "
                             f"({error})") from None
        self.library.no_truncation()                   # some files carry training's settings
        self.library.no_padding()
        self.folder = folder
        self.config = read_json(folder / "tokenizer_config.json")
        beside = read_json(folder / "special_tokens_map.json")
        files = [beside, self.config]                  # what the second names counts
        if "added_tokens_decoder" not in self.config:
            files.reverse()                            # an older folder, as transformers has it
        self.special = special_tokens(files[0]) | special_tokens(files[1])
        self.add_tokens([*self.special.values(), *more_special(beside | self.config)])
        self.special_ids = {i for i, token in self.added.items() if token.special}
        self.stop = stop_tokens(folder)

    def add_tokens(self, special: list[str | dict]):
        """Add tokens as the other files have them, and make ``special`` ones special.

        Those that tokenizer.json lacks take the next ids. Flags of those that it has stay.
        """
        known = {token.content: token for token in self.added.values()}
        for i, token in sorted(tokens_beside(self.folder, self.config, known).items()):
            self.library.add_tokens([token])
            if self.library.token_to_id(token.content) != i:
                raise ModelError(f"{self.folder}: token {i} is not {token.content!r} by "
                                 "tokenizer.json, but by the files beside it")
        known = {token.content: token for token in self.added.values()}
        try:
            tokens = [special_token(token, known) for token in special]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self.folder / 'tokenizer_config.json'}: a special token that is no "
                             f"text ({error})") from None
        self.library.add_special_tokens(tokens)

    @property
    def added(self) -> dict:
        """By id: what is found in a text before all else, as special tokens are."""
        return self.library.get_added_tokens_decoder()

    def encode(self, prompt: str | list[str], chat: bool = False) -> list[int]:
        """Token ids of a text, or of a conversation's turns.

        Begin-of-text comes from the chat template; else as add_bos_token in tokenizer_config.json
        says; and where that says nothing, as tokenizer.json does.
        """
        turns = [prompt] if isinstance(prompt, str) else prompt
        if chat:
            return self.ids_of(self.render(turns), False)
        add_begin = self.config.get("add_bos_token")
        ids = self.ids_of(" ".join(turns), add_begin is not False)
        begin = self.library.token_to_id(self.special.get("bos_token", ""))
        if add_begin and begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        return ids

    def ids_of(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.library.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:                     # the library raises bare Exception
            raise ModelError(f"{self.folder / 'tokenizer.json'}: cannot encode the text "
                             f"({error})") from None

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.library.decode(ids, skip_special_tokens=True)

    def stream(self, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """The text that each token adds; at the end what is left. Joined: the text of all of them.

        "" while a character is still in pieces: "日" may be three tokens, and gives "", "", "日".
        Also while tokens are single bytes of a tokenizer that falls back to bytes: the bytes that
        follow decide what they are.

        A token's text depends on those before it, so some of them are decoded with it and taken off
        again. (The library's DecodeStream raises on some byte sequences.)
        """
        ids = list(prompt)
        start = 0                                      # decoding begins here
        shown = len(prompt)                            # the text of the tokens before this is out
        known = self.decode(prompt)                    # the text from start to shown
        for token in tokens:
            ids.append(token)
            piece = added_text(known, self.decode(ids[start:]))
            if piece == "" or piece.endswith(BROKEN) or self.is_undecided(token):
                yield ""
            else:
                start, shown = shown, len(ids)
                known = self.decode(ids[start:])
                yield piece
        if shown < len(ids):
            yield added_text(known, self.decode(ids[start:]))

    def is_undecided(self, token: int) -> bool:
        """Is it a byte such as <0xE6>, of LLaMA 1 and 2? Or special: bytes join across those."""
        if token in self.special_ids:
            return True
        return re.fullmatch("<0x[0-9A-F]{2}>", self.library.id_to_token(token) or "") is not None

    @property
    def has_chat_template(self) -> bool:
        try:
            return bool(self.chat_template())
        except (OSError, KeyError, TypeError, ValueError):   # ``render`` says what is wrong with it
            return True

    @property
    def template_file(self) -> Path:
        return self.folder / "chat_template.jinja"

    def render(self, turns: list[str]) -> str:
        """The user's and the model's messages in turn, in the model's own chat template."""
        roles = cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self.special,
        }
        try:
            template = self.chat_template()
            if template:
                return within_time(lambda: sandbox().from_string(template).render(values))
        except Exception as error:                     # a template is a program, and may fail
            raise ModelError(f"{self.folder}: the chat template failed: {error}") from None
        raise ModelError(f"{self.folder} has no chat template: leave out --chat")

    def chat_template(self) -> str | None:
        if self.template_file.exists():
            if not self.template_file.is_file():       # reading a pipe would wait for ever
                raise OSError(f"{self.template_file.name} is not a file")
            return self.template_file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):                 # several, by name
            template = {t["name"]: t["template"] for t in template}
        return template.get("default") if isinstance(template, dict) else template


def added_text(known: str, text: str) -> str:
    """What a text adds to a known one. That may end in BROKEN, within a character, and so differ.

    "日" after the first of its bytes: added_text("a\ufffd", "a日") == "日".
    """
    return text[len(commonprefix((known, text))):]


def sandbox():
    """Where a chat template, which is somebody's program, may run: jinja2's sandbox."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what to train on: ignored here."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Without powers: a large one cannot be stopped (see ``within_time``)."""
        intercepted_binops = frozenset(["**"])

        def call_binop(self, context, operator, left, right):
            refuse(f"{operator} is not allowed")

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def now(form):
        return datetime.now().strftime(form)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment


def within_time(work):
    """What ``work()`` returns or raises; TimeoutError if it takes longer than TEMPLATE_SECONDS."""
    outcome = {}

    def run():
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = Thread(target=run, daemon=True)           # so that the process may end without it
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"it did not end within {TEMPLATE_SECONDS} s")
    return outcome["value"]


def special_tokens(config: dict) -> dict[str, str]:
    """By name, as a chat template wants them: bos_token, eos_token, and others of a model's own.

    Each is written as a string or as an object. (add_bos_token is true or false, and no token.)
    """
    extra = config.get("extra_special_tokens")
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {name: written(token) for name, token in named.items()
            if token and isinstance(token, (str, dict))}


def more_special(config: dict) -> list[str | dict]:
    """Special tokens that have no name."""
    tokens = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        if not isinstance(more, (list, dict)):
            raise ModelError(f"tokenizer_config.json: {name} is not a list")
        tokens += more if isinstance(more, list) else []
    return tokens


def written(token: str | dict) -> str:
    """A token's text: files have it as a string, or in an object, beside its flags."""
    return str(token.get("content") if isinstance(token, dict) else token)


def special_token(token: str | dict, known: dict):
    """A special tokenizers.AddedToken, with the flags of the one that is ``known`` by its text."""
    text = written(token)
    if text in known:
        token = {flag: getattr(known[text], flag) for flag in TOKEN_FLAGS} | {"content": text}
    return added_token(token, special=True)


def added_token(token: str | dict, **flags: bool):
    """A tokenizers.AddedToken. ``flags`` are set whatever the object says."""
    from tokenizers import AddedToken
    if isinstance(token, str):
        return AddedToken(token, **flags)
    given = {flag: token[flag] for flag in TOKEN_FLAGS if flag in token}
    return AddedToken(token["content"], **given | flags)


def tokens_beside(folder: Path, config: dict, known: dict) -> dict:
    """The tokens that files beside tokenizer.json list, by id: each a tokenizers.AddedToken.

    An older folder's file says no more than their texts and ids. They are found in a text as it is
    written. (transformers looks in the normalised text, where LLaMA 2's "▁" hides them.)

    config: tokenizer_config.json's. known: tokenizer.json's, by text.
    """
    file = folder / "tokenizer_config.json"
    named = config.get("added_tokens_decoder")
    try:
        if named is None:
            file = folder / "added_tokens.json"
            return {int(i): known.get(text) or added_token(text, normalized=False)
                    for text, i in read_json(file).items()}
        return {int(i): added_token(token) for i, token in named.items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: no table of added tokens ({error})") from None


def stop_tokens(folder: Path) -> set[int]:
    """Ids that end a text: an id or a list of some, from the first file that names any."""
    for file in ("generation_config.json", "config.json"):
        ids = read_json(folder / file).get("eos_token_id")
        if ids in (None, []):
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int for i in ids):         # True is no id
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
    "opt_tokens": int,
}


def are_of_layers(settings: dict) -> bool:
    """Does one of these settings say how layers are skipped? A draft length alone does not."""
    return bool(settings.keys() - {"draft_length"})


def suggested_settings(folder: Path | str | None) -> dict:
    """The settings of CLaSp that a model suggests for itself, if any."""
    if folder is None:
        return {}
    path = Path(folder) / "generation_config.json"
    suggested = read_json(path).get("clasp", {})
    known = isinstance(suggested, dict) and suggested.keys() <= SUGGESTIBLE.keys()
    if not known or not all(isinstance(value, SUGGESTIBLE[name]) and not isinstance(value, bool)
                            for name, value in suggested.items()):
        raise ModelError(f"{path}: clasp may give {', '.join(SUGGESTIBLE)} a (whole) number, no "
                         "more")
    return suggested
