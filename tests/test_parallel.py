"""Several processes write what one writes, bit for bit what they write plainly, and end together.

Ranks are processes on the CPU. ``on_ranks(count, work, ...)`` calls work(rank, ...) in each.
"""
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import DEVICE, REAL, ROOT, same_bits, tokens_of
from folders import small_folder
from safetensors.torch import load_file, save_file

from checkpoint import BUNDLED, load_model
from extras.auto import Auto
from extras.exact import ATTENTION_TRIALS, exact_width, narrowest
from extras.packed import choose_form, pack
from extras.parallel import (
    SharedInput,
    added_in_order,
    all_reduced,
    join_layers,
    my_place,
    shared_clock,
)
from extras.shares import Share
from speculative import Stats, autoregressive, clasp, decode

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not dist.is_gloo_available(), reason="processes on the CPU")
CPU = torch.device("cpu")


def on_ranks(count: int, work, folder: Path, *args) -> list:
    """What ``work`` returns on each rank. folder: an empty one, for files."""
    torch.multiprocessing.spawn(as_rank, (count, work, str(folder), args), count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def as_rank(rank: int, count: int, work, folder: str, args: tuple):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    with torch.inference_mode():
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def same_on_all(found: list):
    assert all(other == found[0] for other in found[1:])


# ---------------------------------------------------------------- sums, clock, input

def sums(rank: int) -> dict:
    """By dtype: what rows of one kind add up to, alone and among others, and by the library."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        random = torch.Generator().manual_seed(rank)
        row = torch.randn(1, 1, 40, generator=random).to(dtype)
        alone = added_in_order(row)
        among = added_in_order(row.repeat(1, 9, 1))
        found[dtype] = alone, among, all_reduced(row)
    return found


def test_sums_are_in_the_order_of_ranks_whatever_a_rows_place(tmp_path):
    count = 3
    by_rank = on_ranks(count, sums, tmp_path)
    for dtype, (alone, among, by_library) in by_rank[0].items():
        total = torch.zeros(1, 1, 40)
        for rank in range(count):
            random = torch.Generator().manual_seed(rank)
            total = total + torch.randn(1, 1, 40, generator=random).to(dtype).float()
        assert same_bits(alone, total.to(dtype))
        assert same_bits(among, alone.expand(1, 9, 40))
        torch.testing.assert_close(by_library, alone)
        for found in by_rank[1:]:
            assert same_bits(found[dtype][0], alone)
            assert same_bits(found[dtype][2], by_library)


def three_times(rank: int) -> list[float]:
    now = shared_clock(CPU)
    return [now() for _ in range(3)]


def test_all_ranks_have_one_clock(tmp_path):
    found = on_ranks(2, three_times, tmp_path)
    same_on_all(found)
    assert found[0] == sorted(found[0])


def lines_read(rank: int, text: bytes) -> list[str]:
    source = io.BytesIO(text) if rank == 0 else None
    return io.TextIOWrapper(io.BufferedReader(SharedInput(source))).readlines()


def test_what_rank_0_reads_all_ranks_read(tmp_path):
    text = "Grüße\nand more\n" + 20000 * "x" + "\nend"
    for lines in on_ranks(2, lines_read, tmp_path, text.encode()):
        assert "".join(lines) == text


# ---------------------------------------------------------------- who is one of several

def test_only_what_torchrun_sets_all_of_makes_several_processes(monkeypatch):
    """Cluster scripts export some of it."""
    told = {"MASTER_ADDR": "localhost", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "3"}
    for name in told:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        assert my_place().is_alone
        monkeypatch.setenv(name, value)
    assert my_place() == (1, 3, 1, 3)


# ---------------------------------------------------------------- texts

def shared_model(folder: Path, dtype, rank: int = 0, count: int = 1):
    form = choose_form(CPU, dtype)
    model = load_model(folder, CPU, dtype, form, Share(rank, count))
    if count > 1:
        join_layers(model, added_in_order)
    return pack(model)


def texts(rank: int, count: int, folder: Path, dtype, prompts: int, tokens: int) -> dict:
    """By kind of decoding, of each prompt: its tokens, the DP's sets; and plain decoding's."""
    model = shared_model(folder, dtype, rank, count)
    width = exact_width(model, 5)
    found = {"width": width}
    exact = {"width": width, "narrowest": width and narrowest(model, width)}
    for i in range(prompts):
        prompt = tokens_of(model, 7 + 5 * i, seed=i)
        stats = Stats()
        greedy = clasp(model, prompt, tokens, skip_layers=3, opt_interval=2, stats=stats, **exact)
        auto = decode(model, prompt, tokens, Auto(model), **exact)
        found["clasp", i] = list(greedy)
        found["sets", i] = stats.skip_sets
        found["auto", i] = list(auto)
        found["plain", i] = list(autoregressive(model, prompt, tokens, **exact))
        found["one row", i] = list(autoregressive(model, prompt, tokens))
        found["sampled", i] = list(clasp(model, prompt, tokens, skip_layers=3, temperature=0.8,
                                         seed=i, opt_interval=2))
    return found


def ties(folder: Path, prompt: list[int], ours: list[int], theirs: list[int]) -> int:
    """Where two greedy texts part, if they do, two tokens must all but tie: 1; else 0."""
    if ours == theirs:
        return 0
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    model = load_model(folder)
    logits = model.logits(model(torch.tensor([[*prompt, *ours[:at]]]))[-1])[0, -1]
    first, second = logits.topk(2).values
    assert first - second < 1e-3 * first.abs()
    return 1


@pytest.fixture(scope="module")
def four_by_four(tmp_path_factory) -> Path:
    """A random model with 8 heads and 4 key-value heads."""
    return small_folder(tmp_path_factory.mktemp("parallel") / "model", layers=6, heads=8)


CASES = [
    pytest.param("random", 2, 2, 16, id="random on 2"),
    pytest.param("random", 4, 2, 16, id="random on 4", marks=pytest.mark.thorough),
    pytest.param(BUNDLED, 2, 1, 24, id="bundled on 2", marks=pytest.mark.thorough),
    pytest.param(BUNDLED, 3, 1, 24, id="bundled on 3", marks=pytest.mark.thorough),
    pytest.param(REAL, 3, 1, 8, id="real on 3",
                 marks=[pytest.mark.thorough, pytest.mark.skipif(not REAL, reason="none given")]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, count, prompts, tokens", CASES)
def test_texts_are_those_of_plain_decoding_and_of_one_process(
        name, count, prompts, tokens, dtype, four_by_four, tmp_path):
    folder = four_by_four if name == "random" else Path(name)
    by_rank = on_ranks(count, texts, tmp_path, count, folder, dtype, prompts, tokens)
    same_on_all(by_rank)
    found = by_rank[0]
    alone = shared_model(folder, dtype)
    if found["width"] is None:
        pytest.skip("no number of rows is exact on this machine")
    for i in range(prompts):
        assert found["clasp", i] == found["auto", i] == found["plain", i]
        if dtype == torch.float32:
            prompt = tokens_of(alone, 7 + 5 * i, seed=i)
            expected = list(autoregressive(alone, prompt, tokens))
            assert ties(folder, prompt, found["one row", i], expected) <= 1


def prices(rank: int, folder: Path) -> tuple[float, bool]:
    model = shared_model(folder, torch.float32, rank, 2)
    auto = Auto(model)
    return auto.costs.head_share, auto.skipping.hopeful


def test_ranks_of_unequal_shares_have_the_same_prices(tmp_path, monkeypatch):
    """Else one would draft where another does not, and both would wait for ever."""
    folder = small_folder(tmp_path / "model", heads=6)
    alone = Auto(load_model(folder))
    for found in on_ranks(2, prices, tmp_path, folder):
        assert found == (alone.costs.head_share, alone.skipping.hopeful)


def width_where_one_rank_is_uneven(rank: int, folder: Path) -> int | None:
    """On rank 1 five rows of attention differ, too little for the sum of all heads to show it."""
    model = shared_model(folder, torch.float32, rank, 2)
    layer = model.layers[0]
    attend = layer.attend
    calls = 0

    def uneven(q, k, v, mask):
        nonlocal calls
        calls += 1
        heads = attend(q, k, v, mask)
        if rank == 1 and q.shape[2] == 5 and calls == 1 + ATTENTION_TRIALS:      # after a layer's
            heads[:, :, -1] += 1
        return heads

    layer.attend = uneven
    return exact_width(model, 5)


@pytest.mark.parametrize("heads", [8, 6])
def test_ranks_agree_on_a_width_though_one_alone_sees_that_another_fails(tmp_path, heads):
    """Of 6 heads the ranks have unequal shares, and so draw keys of other shapes."""
    folder = small_folder(tmp_path / "model", heads=heads)
    width, other_width = on_ranks(2, width_where_one_rank_is_uneven, tmp_path, folder)
    assert width == other_width != 5


def width_and_kind(rank: int, folder: Path) -> tuple:
    model = shared_model(folder, torch.float32, rank, 2)
    return exact_width(model, 5), type(model.layers[1].qkv).__name__


def test_ranks_agree_on_a_width_though_their_matrices_are_packed_differently(tmp_path):
    """Here the first heads of a layer were saved from 16 bits, and the others were not."""
    folder = small_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for name in ("q", "k", "v"):
        whole = weights[f"model.layers.1.self_attn.{name}_proj.weight"]
        first = whole[:len(whole) // 2]
        first.copy_(first.bfloat16())
    save_file(weights, folder / "model.safetensors")
    (width, kind), (other_width, other_kind) = on_ranks(2, width_and_kind, tmp_path, folder)
    assert width == other_width
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert kind != other_kind


# ---------------------------------------------------------------- the program

def torchrun(count: int, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*command, "generate.py", "--device", "cpu", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def lines_of_ours(stderr: str) -> list[str]:
    """But for torchrun's own."""
    return [line for line in stderr.splitlines() if line.startswith("generate.py: ")]


@pytest.mark.thorough
def test_the_program_writes_one_text_and_one_report():
    process = torchrun(3, "--temperature", "0", "--max-new-tokens", "30", "--json", "--compare")
    out, err = process.communicate()
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["identical"]
    assert err.count("tokens per pass") == 1


@pytest.mark.thorough
@pytest.mark.parametrize("count, arguments, word", [
    (4, [], "4 processes cannot share 3 heads"),
    (3, ["--temperature", "-1"], "temperature"),
    (3, ["--nonsense"], "nonsense"),
    (3, ["--model", "/nonexistent"], "nonexistent"),
])
def test_a_users_mistake_is_one_line_and_all_end(count, arguments, word):
    process = torchrun(count, *arguments)
    out, err = process.communicate()
    assert process.returncode != 0
    assert out == ""
    (line,) = lines_of_ours(err)
    assert word in line


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 2])
def test_when_a_process_is_killed_all_end(rank):
    process = torchrun(3, "--temperature", "0", "--max-new-tokens", "450")
    ranks = ranks_of(process, 3)
    process.stdout.read(1)                                         # the text has begun
    os.kill(ranks[rank], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(lines_of_ours(err)) <= 1                            # torchrun may be faster
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def ranks_of(process: subprocess.Popen, count: int) -> list[int]:
    """The process ids of all ranks, once they are there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.parent.exists():
        pytest.skip("only Linux shows them")
    while len(found := children.read_text().split()) < count:
        time.sleep(0.1)
    return sorted(map(int, found))


@pytest.mark.thorough
def test_a_prompt_from_standard_input_reaches_all_ranks():
    options = ["--prompt-file", "-", "--temperature", "0", "--max-new-tokens", "12", "--json"]
    several = torchrun(3, *options, stdin=subprocess.PIPE)
    out, err = several.communicate("One day a fox")
    alone = subprocess.run([sys.executable, "generate.py", *options], input="One day a fox",
                           cwd=ROOT, capture_output=True, text=True)
    assert json.loads(out)["prompt_tokens"] == json.loads(alone.stdout)["prompt_tokens"]
    assert json.loads(out)["text"] == json.loads(alone.stdout)["text"]


@pytest.mark.thorough
def test_the_page_of_a_run_is_written_once_and_shows_the_same(tmp_path):
    path = tmp_path / "run.html"
    process = torchrun(3, "--temperature", "0", "--max-new-tokens", "12", "--trace", str(path))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.strip() and out.split()[0] in path.read_text(encoding="utf-8")
    assert err.count("is shown in") == 1
