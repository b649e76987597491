"""The model that is measured, how it reads questions, and the settings that CLaSp uses on it."""
import argparse
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch

from checkpoint import (
    BUNDLED,
    SUGGESTIBLE,
    Tokenizer,
    are_of_layers,
    find_folder,
    load_model,
    short_name,
    suggested_settings,
)
from extras.cuda_graphs import GraphedLlama
from extras.exact import exact_passes
from extras.packed import bytes_read, choose_threads, pack, put_into
from generate import Parser, choose_device, form_of_weights
from model import Config, Llama
from speculative import (
    DRAFT_LENGTH,
    EXIT_THRESHOLD,
    OPT_INTERVAL,
    OPT_TOKENS,
    Clasp,
    require,
)

# Models that are measured without their weights: true speed, a text that is noise.
SHAPES = {
    "tiny": Config(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192),
    "smollm2-135m": Config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True),
    "llama3.2-1b": Config(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True),
    "llama3.2-3b": Config(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        tie_word_embeddings=True),
    "llama3-8b": Config(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192),
    "llama3-70b": Config(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192),
    "llama3.1-405b": Config(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=131072),
}


@dataclass
class Target:
    name: str
    model: Llama | GraphedLlama
    tokenizer: Tokenizer | None         # None: random weights, for which a word is a token
    settings: dict                      # of ``speculative.Clasp``
    bytes_read: int = 0                 # of weights, for one token
    fingerprint: float = 0.0            # of the weights: results belong to one model
    weights: str | None = None          # "int8"; None: as they come
    suited: bool = False                # is a setting of layers typed, or suggested by the model?

    def __post_init__(self):
        Clasp(self.model, **self.settings)                # refuses what is out of range

    @property
    def layers(self) -> int:
        return len(self.model.layers)

    @property
    def draft_length(self) -> int:
        return self.settings["draft_length"]

    @property
    def auto_means(self) -> str:
        return "auto's layers have these too" if self.suited else "auto finds its own layers"

    @property
    def stop(self) -> set[int]:
        return self.tokenizer.stop if self.tokenizer else set()

    @cached_property
    def passes(self) -> dict[str, int]:
        """How wide passes are in which CLaSp is exact to the last bit, see ``exact_passes``."""
        return exact_passes(self.model, self.draft_length + 1)

    @property
    def width(self) -> int | None:
        """Most rows of such a pass; None if no width is exact here. Then none is padded."""
        return self.passes.get("width")

    @property
    def has_graphs(self) -> bool:
        return isinstance(self.model, GraphedLlama)

    @property
    def where(self) -> str:
        """Machine, dtypes and PyTorch, for the head of a table."""
        if self.model.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.model.device)
        else:
            kind = torch.backends.cpu.get_cpu_capability()
            machine = f"{torch.get_num_threads()} threads of a CPU with {kind}"
        dtype = str(self.model.embed.weight.dtype).removeprefix("torch.")
        weights = f" with weights in {self.weights}" if self.weights else ""
        return f"{machine}, {dtype}{weights}, torch {torch.__version__}"

    def encode(self, turns: list[str]) -> list[int]:
        """Token ids of a conversation, in the model's chat template if it has one."""
        if self.tokenizer is None:
            words = " ".join(turns).split()
            numbers = [zlib.crc32(word.encode(errors="surrogatepass")) for word in words]
            return [number % self.model.config.vocab_size for number in numbers]
        return self.tokenizer.encode(turns, self.tokenizer.has_chat_template)

    def decode(self, tokens: list[int]) -> str:
        return str(tokens) if self.tokenizer is None else self.tokenizer.decode(tokens)


def add_model_arguments(parser: Parser):
    add = parser.add_argument
    add("--model", metavar="PATH_OR_REPO",
        help="a folder or a Hugging Face repo id; default: the bundled model")
    add("--synthetic", choices=list(SHAPES),
        help="random weights of this shape instead of a model")
    add("--residual", type=float, default=0.03, metavar="R",
        help="synthetic: scale of what the middle layers add; 0.03: tau 4 at M 14, K 7; less: "
             "more; default: %(default)s")
    add("--device", metavar="cpu|cuda|cuda:N|mps", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: float32 on the CPU, bfloat16 elsewhere and with --weights")
    add("--weights", choices=["int8"], help="keep weights in eight bits")
    add("--cuda-graphs", action="store_true",
        help="decode through extras/cuda_graphs.py (a CPU records nothing)")
    by_model = "default: what the model suggests, else"
    add("--skip-layers", type=int, metavar="M", help=f"{by_model} the paper's half")
    add("--draft-length", type=int, metavar="K", help=f"{by_model} generate.py's")
    add("--exit-threshold", type=float, metavar="X", help=f"{by_model} generate.py's")
    add("--opt-interval", type=int, metavar="N", help=f"{by_model} generate.py's")
    add("--opt-tokens", type=int, metavar="T", help=f"{by_model} generate.py's")


def target_arguments(options: list[str]) -> argparse.Namespace:
    """These options, and the defaults of the others, for ``load_target``."""
    parser = Parser()
    add_model_arguments(parser)
    return parser.parse_args(options)


def load_target(args: argparse.Namespace) -> Target:
    """The model that the command line names, ready to be measured.

    args: of ``add_model_arguments``. Settings that are None are as the model suggests, else the
    defaults.
    """
    require(not (args.synthetic and args.model), "--synthetic or --model, not both")
    device, dtype = choose_device(args.device, args.dtype, args.weights)
    form = form_of_weights(args.weights, device, dtype)
    if args.synthetic:
        folder = None
        tokenizer = None
        model = synthetic(SHAPES[args.synthetic], args.residual, device, dtype)
        put_into(model, form)
        name = (f"{args.synthetic} with RANDOM WEIGHTS (residual {args.residual}; the text is "
                "noise)")
    else:
        asked = args.model or str(BUNDLED)
        folder = find_folder(asked)
        tokenizer = Tokenizer(folder)
        model = load_model(folder, device, dtype, form)
        name = short_name(asked)
    pack(model)
    choose_threads(model)
    chosen = suggested_settings(folder) | typed_settings(args)
    settings = clasp_settings(len(model.layers), chosen)
    read = bytes_read(model)
    fingerprint = fingerprint_of(model)
    if args.cuda_graphs:
        model = GraphedLlama(model)
    return Target(name, model, tokenizer, settings, read, fingerprint, args.weights,
                  are_of_layers(chosen))


@torch.inference_mode()
def fingerprint_of(model: Llama) -> float:
    """A number that all weights have a part in, whatever form they are kept in."""
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device).unsqueeze(0)
    number = model.logits(model(tokens)[-1]).double().abs().sum().item()
    if not model.config.tie_word_embeddings:               # these tokens read some rows of it only
        rows = model.embed.weight.sum(1, dtype=torch.float64)
        number += (rows @ torch.arange(len(rows), device=rows.device).double()).item()
    return number


def typed_settings(args) -> dict:
    return {name: getattr(args, name) for name in SUGGESTIBLE if getattr(args, name) is not None}


def clasp_settings(layers: int, chosen: dict) -> dict:
    """What is chosen, else the paper's half and the defaults."""
    settings = {
        "skip_layers": layers // 2,
        "draft_length": DRAFT_LENGTH,
        "exit_threshold": EXIT_THRESHOLD,
        "opt_interval": OPT_INTERVAL,
        "opt_tokens": OPT_TOKENS,
    }
    return settings | chosen


def empty_model(config: Config, device, dtype) -> Llama:
    """A model whose weights have memory but no values yet."""
    with torch.device("meta"):
        model = Llama(config)                          # no memory yet
    # What ``to_empty`` does; but that would import torch._dynamo, for half a second.
    model._apply(lambda weight: torch.empty(weight.shape, dtype=dtype, device=device))
    return model.requires_grad_(False).eval()


def synthetic(config: Config, residual: float, device, dtype) -> Llama:
    """Random weights of a shape.

    residual: scales what all layers but the first two and the last two add to the stream. The
        smaller it is, the less it matters which of them are skipped: it sets the acceptance.
    """
    model = empty_model(config, device, dtype)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.fill_(1)
        else:
            weight.normal_(std=weight.shape[1] ** -0.5)
    for layer in model.layers[2:-2]:
        layer.o.weight.mul_(residual)
        layer.down.weight.mul_(residual)
    return model
