"""Will it fit? What is calculated, that it bounds what is used, and what is said if it does not."""
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, ROOT

import checkpoint
import generate
from bench.target import SHAPES
from extras import memory
from extras.memory import Plan, needed, require_fits
from extras.packed import is_x86
from speculative import SettingsError

GPU = torch.device("cuda")
CPU = torch.device("cpu")
LLAMA_8B = SHAPES["llama3-8b"]


def plan_of(device=GPU, tokens=4096, **fields) -> Plan:
    return Plan(LLAMA_8B, device, torch.bfloat16, tokens, **fields)


# ---------------------------------------------------------------- what is calculated

def test_weights_take_what_their_number_and_dtype_say():
    """LLaMA-3-8B has 8,030,261,248; its norms are not worth counting."""
    assert needed(plan_of()).weights == pytest.approx(2 * 8_030_261_248, rel=1e-4)


def test_eight_bits_halve_all_but_the_embedding():
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    rest = needed(plan_of()).weights - 2 * embedding
    assert needed(plan_of(weights="int8")).weights == rest // 2 + 2 * embedding


@pytest.mark.skipif(not is_x86(CPU), reason="FBGEMM is not used")
def test_columns_that_fbgemm_adds_are_counted(monkeypatch):
    """A matrix of 576 columns takes 1,024."""
    monkeypatch.setattr(memory, "has_arithmetic", lambda dtype: False)
    plan = Plan(SHAPES["smollm2-135m"], CPU, torch.bfloat16, tokens=64)
    assert memory.kept(plan, 3, 576) == 3 * 1024
    assert memory.kept(plan, 3, 1024) == 3 * 1024


def test_a_token_takes_keys_and_values_of_every_layer():
    more = needed(plan_of(tokens=8192)).cache - needed(plan_of(tokens=4096)).cache
    assert more == 4096 * 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_layers_and_cache_but_not_embedding_and_head(count):
    whole = needed(plan_of())
    each = needed(plan_of(processes=count))
    twice = 2 * 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    assert each.weights == (whole.weights - twice) // count + twice
    assert each.cache == whole.cache // count


def test_a_tied_head_takes_memory_only_where_it_is_packed():
    tied = replace(LLAMA_8B, tie_word_embeddings=True)
    embedding = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    on_gpu = plan_of()._replace(config=tied)
    assert needed(plan_of()).weights - needed(on_gpu).weights == embedding
    apart = plan_of(weights="int8")
    assert needed(on_gpu._replace(weights="int8")).weights == needed(apart).weights


def test_as_many_matrices_are_counted_as_are_in_the_making_at_once():
    assert memory.LOADERS == checkpoint.LOADERS


# ---------------------------------------------------------------- what is said

@pytest.fixture
def free(monkeypatch):
    def set_free(size: float):
        monkeypatch.setattr(memory, "free_memory", lambda device: int(size))
    return set_free


def refusal(plan: Plan, prompt: int = 100, here: int = 1) -> str:
    with pytest.raises(SettingsError) as error:
        require_fits(plan, prompt, here)
    return str(error.value)


def test_what_fits_is_not_refused(free):
    free(needed(plan_of()).total)
    require_fits(plan_of(), 100)


def test_processes_on_one_device_share_its_memory(free):
    plan = plan_of(processes=2)
    free(1.5 * needed(plan).total)
    require_fits(plan, 100)
    assert "not enough memory" in refusal(plan, here=2)


def test_what_is_not_known_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    require_fits(plan_of(), 100)


def test_the_refusal_has_the_numbers_and_what_would_fit(free):
    free(10e9)
    said = refusal(plan_of())
    assert "weights 16.1 GB" in said
    assert "10.0 GB free" in said
    assert "--weights int8" in said
    assert "torchrun --nproc-per-node 2" in said or "torchrun --nproc-per-node 4" in said
    assert "--max-new-tokens" not in said                          # none is few enough


@pytest.mark.parametrize("size", range(3, 18))
@pytest.mark.parametrize("tokens", [1000, 8192])
def test_what_is_said_to_fit_is_not_refused(free, size, tokens):
    plan = plan_of(tokens=tokens)
    free(size * 1e9)
    if needed(plan).total <= size * 1e9:
        return
    said = refusal(plan)
    if "int8" in said:
        require_fits(plan._replace(weights="int8"), 100)
    if "nproc" in said:
        count = int(re.search(r"nproc-per-node (\d+)", said)[1])
        require_fits(plan._replace(processes=count), 100)
    if "max-new" in said:
        new = int(re.search(r"max-new-tokens (\d+)", said)[1])
        require_fits(plan._replace(tokens=100 + new), 100)


def test_fewer_tokens_are_offered_where_the_cache_is_what_does_not_fit(free):
    free(needed(plan_of(tokens=1000)).total)
    assert "--max-new-tokens" in refusal(plan_of(tokens=8000))


def test_the_program_refuses_before_it_reads_weights(free, monkeypatch, capsys):
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("read"))
    free(1e6)
    assert generate.main(["--device", DEVICE]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and "not enough memory" in said.err


# ---------------------------------------------------------------- what there is, and what is used

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says")
def test_the_machine_says_how_much_is_free():
    assert 2 ** 20 < memory.free_memory(CPU) < 2 ** 45


def test_a_container_may_take_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.limit_of_container() is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.limit_of_container() is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 250\ninactive_file 150\n")
    assert memory.limit_of_container() == 700


def test_the_least_that_is_known_counts_and_nothing_left_is_known_too(monkeypatch):
    for machine, container, free in [(None, None, None), (5, None, 5), (5, 3, 3), (5, 0, 0)]:
        monkeypatch.setattr(memory, "available_memory", lambda: machine)
        monkeypatch.setattr(memory, "limit_of_container", lambda: container)
        assert memory.free_memory(CPU) == free


ON_LINUX = DEVICE == "cpu" and sys.platform == "linux"


@pytest.mark.thorough
@pytest.mark.skipif(not ON_LINUX, reason="measured on a CPU, on Linux")
@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--weights", "int8"]], ids=str)
def test_what_is_calculated_bounds_what_is_used(options):
    """But for what the libraries take for themselves, in GB."""
    libraries = 0.2
    done = subprocess.run(
        [sys.executable, "tools/memory.py", "load", "smollm2-135m", *options],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.search(r"([.\d]+) GB with a first token, ([.\d]+) GB calculated", done.stdout)
    assert float(used[1]) <= float(used[2]) + libraries, done.stdout
