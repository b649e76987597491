"""What each of several processes (ranks) holds of a model: see parallel.py.

    q, k, v, gate, up   some of the rows: the rows of a head, or of an MLP's column, together
    o, down             the same columns, of all rows: what comes out is a part of a sum
    all others          whole

Ranks hold alike parts, as far as that goes: 3 heads on 2 ranks are 1 and 2. Attention wants as many
heads for each key-value head. So a rank has all heads of some key-value heads; or, where ranks are
more than key-value heads, some heads of one, and several ranks have the same key-value head.
"""
from dataclasses import replace
from typing import NamedTuple

from model import Config
from speculative import require


def cut(total: int, rank: int, count: int) -> range:
    """One of ``count`` neighbouring parts of 0 .. total-1; none is larger than the last."""
    return range(rank * total // count, (rank + 1) * total // count)


class Share(NamedTuple):
    """One of ``count`` ranks' part of a model: a ``share`` for load_model."""
    rank: int
    count: int

    def heads(self, config: Config) -> tuple[range, range]:
        """This rank's heads, and its key-value heads."""
        kv_heads = config.num_key_value_heads
        group = config.num_attention_heads // kv_heads
        if self.count <= kv_heads:
            own = cut(kv_heads, self.rank, self.count)
            return range(own.start * group, own.stop * group), own
        ranks = self.count // kv_heads                               # for each key-value head
        kv_head, place = divmod(self.rank, ranks)
        own = cut(group, place, ranks)
        first = kv_head * group
        return range(first + own.start, first + own.stop), range(kv_head, kv_head + 1)

    def config(self, config: Config) -> Config:
        """Of the model that this rank has."""
        heads, kv_heads = self.heads(config)
        return replace(
            config,
            num_attention_heads=len(heads),
            num_key_value_heads=len(kv_heads),
            intermediate_size=len(cut(config.intermediate_size, *self)))

    def of_tensor(self, config: Config, name: str) -> tuple[slice, slice] | slice:
        """The part of a tensor of this name in a file, as an index."""
        heads, kv_heads = self.heads(config)
        columns = cut(config.intermediate_size, *self)
        size = config.head_dim
        whole = slice(None)
        parts = {
            "q_proj": (rows_of(heads, size), whole),
            "k_proj": (rows_of(kv_heads, size), whole),
            "v_proj": (rows_of(kv_heads, size), whole),
            "o_proj": (whole, rows_of(heads, size)),
            "gate_proj": (rows_of(columns), whole),
            "up_proj": (rows_of(columns), whole),
            "down_proj": (whole, rows_of(columns)),
        }
        return parts.get(name.split(".")[-2], whole)


def rows_of(some: range, size: int = 1) -> slice:
    """Of some things, each of which has ``size`` rows (or columns)."""
    return slice(some.start * size, some.stop * size)


def can_share(config: Config, count: int) -> bool:
    """Has each of so many ranks a head, and as much of each MLP as any other?"""
    kv_heads = config.num_key_value_heads
    heads_fit = count <= kv_heads or count % kv_heads == 0 and count <= config.num_attention_heads
    return heads_fit and config.intermediate_size % count == 0


def require_shareable(config: Config, count: int):
    works = [n for n in range(1, config.num_attention_heads + 1) if can_share(config, n)]
    require(count in works,
            f"{count} processes cannot share {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} key-value heads and MLPs {config.intermediate_size} "
            f"wide: --nproc-per-node may be {', '.join(map(str, works))}")
