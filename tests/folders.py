"""Small model folders on disk, for tests that break them, vary them, or run programs on them."""
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from conftest import random_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers

from checkpoint import BUNDLED, named_weights

GOLDEN = Path(__file__).parent / "golden"


def set_fields(folder: Path, file: str, **fields):
    """Change fields of a JSON file; None takes one out."""
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    wanted = {name: value for name, value in (known | fields).items() if value is not None}
    path.write_text(json.dumps(wanted))


def edit_weights(folder: Path, **changed):
    """Put tensors into model.safetensors, by name with _ for the dots; None takes one out."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    names = {name.replace(".", "_"): name for name in weights}
    for key, tensor in changed.items():
        name = names.get(key, key)
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, path)


def copy_tokenizer(folder: Path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)


def small_folder(folder: Path, context: int = 512, layers: int = 3, heads: int = 4) -> Path:
    """A random model of the bundled one's vocabulary, which never ends a text by itself."""
    folder.mkdir()
    copy_tokenizer(folder)
    vocabulary = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
    model = random_model(layers, vocabulary, context=context, heads=heads).cpu()
    weights = {name: view.contiguous() for name, view in named_weights(model).items()}
    save_file(weights, folder / "model.safetensors")
    set_fields(folder, "config.json", model_type="llama", **asdict(model.config))
    return folder


BYTE_FALLBACK = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁abé日",
    "▁a",
    "ab",
]


def byte_fallback_tokenizer(path: Path):
    """tokenizer.json as of LLaMA 1 and 2: what no other token writes is written byte by byte."""
    vocabulary = {token: i for i, token in enumerate(BYTE_FALLBACK)}
    merges = [("▁", "a"), ("a", "b")]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.save(str(path))
