"""extras/shares.py: what ranks hold is together the whole model, and each part is a model."""
from dataclasses import replace

import pytest
import torch
from folders import small_folder

from checkpoint import BUNDLED, load_model, named_weights, read_config
from extras.shares import Share, can_share, require_shareable
from model import Config
from speculative import SettingsError


def with_heads(heads: int, kv_heads: int, width: int) -> Config:
    return replace(read_config(BUNDLED), num_attention_heads=heads, num_key_value_heads=kv_heads,
                   intermediate_size=width)


@pytest.mark.parametrize("heads, kv_heads, width, counts", [
    (32, 8, 14336, [1, 2, 4, 7, 8, 16, 32]),                       # LLaMA-3-8B
    (9, 3, 1536, [1, 2, 3, 6]),                                    # SmolLM2-135M
    (3, 1, 384, [1, 2, 3]),                                        # the bundled model
    (8, 4, 50, [1, 2]),
])
def test_every_head_and_column_is_some_ranks(heads, kv_heads, width, counts):
    config = with_heads(heads, kv_heads, width)
    assert [n for n in range(1, 33) if can_share(config, n)] == counts
    with pytest.raises(SettingsError, match=", ".join(map(str, counts))):
        require_shareable(config, 33)
    for count in counts:
        shares = [Share(rank, count) for rank in range(count)]
        found = [share.heads(config) for share in shares]
        assert [head for own, _ in found for head in own] == list(range(heads))
        assert {head for _, own in found for head in own} == set(range(kv_heads))
        for share, (own, kv_own) in zip(shares, found):
            small = share.config(config)
            assert small.num_attention_heads == len(own) > 0
            # As attention pairs heads with key-value heads in the small model and in the whole.
            for i, head in enumerate(own):
                group = len(own) // len(kv_own)
                assert kv_own[i // group] == head // (heads // kv_heads)
        assert max(len(own) for own, _ in found) == len(found[-1][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with 6 heads, 3 key-value heads and MLPs that 1, 2, 3, 4 and 6 can share."""
    return small_folder(tmp_path_factory.mktemp("shares") / "model", heads=6)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_what_ranks_hold_of_a_layer_is_together_the_whole(folder, count):
    whole = named_weights(load_model(folder))
    ranks = [named_weights(load_model(folder, share=Share(i, count))) for i in range(count)]
    for name, weight in whole.items():
        pieces = [rank[name] for rank in ranks]
        if ".k_proj" in name or ".v_proj" in name:
            held = {tuple(row.tolist()) for piece in pieces for row in piece}
            assert held == {tuple(row.tolist()) for row in weight}
        elif "_proj" in name:
            dim = 1 if "o_proj" in name or "down_proj" in name else 0
            assert torch.equal(torch.cat(pieces, dim), weight)
        else:
            assert all(torch.equal(piece, weight) for piece in pieces)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_what_ranks_add_to_a_state_is_together_what_the_layer_adds(folder, count):
    """Of attention; that an MLP's columns add up is plain."""
    whole = load_model(folder)
    ranks = [load_model(folder, share=Share(i, count)) for i in range(count)]
    rows = torch.arange(10).unsqueeze(0)
    before = whole(rows)[0]
    added = torch.zeros_like(before)
    for rank in ranks:
        rank.layers[0].down.weight.zero_()                           # attention's part alone
        added += rank(rows)[1] - before
    whole.layers[0].down.weight.zero_()
    torch.testing.assert_close(added, whole(rows)[1] - before)


def test_a_rank_reads_its_part_of_the_layers_and_no_more(folder, monkeypatch):
    """But for the norms, which are small and whole everywhere, as embedding and head are."""
    read = []

    def note(place, stored, part):
        read[-1] += place.numel() if "_proj" in stored.name else 0

    monkeypatch.setattr("checkpoint.read_into", note)
    for rank in range(3):
        read.append(0)
        load_model(folder, share=Share(rank, 3))
    config = read_config(folder)
    third = config.num_hidden_layers * config.layer_weights // 3
    assert read == [third, third, third]
