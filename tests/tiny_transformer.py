"""A small transformer with a paged KV cache, to compare its tokens over elastic memory with those over a plain one."""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

import torch

from memory_agent.extents import ExtentMap, KvGeometry, KvRegion

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 8, 512, 1000
BLOCK_TOKENS, BLOCKS = 256, 24
PAGE_BYTES = 2 * BLOCK_TOKENS * WIDTH * 4  # keys and values of one layer in one block
BLOCK_BYTES = LAYERS * PAGE_BYTES  # 2 MiB
SHAPE = (BLOCKS, LAYERS, 2, BLOCK_TOKENS, WIDTH)
SIZE_BYTES = BLOCKS * BLOCK_BYTES
GEOMETRY = KvGeometry(SIZE_BYTES, BLOCKS, (KvRegion(0, LAYERS, PAGE_BYTES, BLOCK_BYTES, PAGE_BYTES),))

BeforeStep = Callable[[int], object]
"""Called before each forward with the number of tokens that will be in the cache after it."""


class Transformer:
    """Random weights, float32, a paged KV cache. Attention is sharp, so that a token hangs on few others."""

    def __init__(self, device: torch.device) -> None:
        random = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=random) * shape[0] ** -0.5).to(device)

        self.embedding, self.positions = weights(VOCABULARY, WIDTH), weights(BLOCKS * BLOCK_TOKENS, WIDTH)
        self.head = weights(WIDTH, VOCABULARY)
        self.layers = [(weights(WIDTH, 3 * WIDTH), weights(WIDTH, WIDTH)) for _ in range(LAYERS)]

    def forward(self, tokens: torch.Tensor, start: int, kv: torch.Tensor, table: torch.Tensor) -> int:
        """The next token after ``tokens``, which stand at ``start`` and later; their keys and values go into ``kv``."""
        end = start + len(tokens)
        at = torch.arange(start, end, device=tokens.device)
        used = table[: -(-end // BLOCK_TOKENS)]
        x = self.embedding[tokens] + self.positions[at]
        for layer, (into, out) in enumerate(self.layers):
            query, key, value = (torch.nn.functional.layer_norm(x, (WIDTH,)) @ into).chunk(3, dim=-1)
            kv[table[at // BLOCK_TOKENS], layer, 0, at % BLOCK_TOKENS] = key
            kv[table[at // BLOCK_TOKENS], layer, 1, at % BLOCK_TOKENS] = value
            keys, values = (kv[used, layer, part].reshape(-1, WIDTH)[:end] for part in (0, 1))
            causal = torch.arange(end, device=tokens.device) <= at[:, None]
            heads = [part.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for part in (4 * query, keys, values)]
            attended = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=causal)
            x = 0.5 * x + attended.transpose(0, 1).reshape(-1, WIDTH) @ out
        return int((x[-1] @ self.head).argmax())


def generate(model: Transformer, kv: torch.Tensor, table: torch.Tensor, new: int, before_step: BeforeStep) -> list[int]:
    prompt = torch.arange(700, device=kv.device) * 7 % VOCABULARY
    before_step(len(prompt))
    tokens = [model.forward(prompt, 0, kv, table)]
    while len(tokens) < new:
        at = len(prompt) + len(tokens) - 1
        before_step(at + 1)
        tokens.append(model.forward(torch.tensor(tokens[-1:], device=kv.device), at, kv, table))
    return tokens


@dataclass(frozen=True)
class ElasticCache:
    """A KV cache of GEOMETRY whose memory comes and goes.

    Attributes:
        kv: its tensor, of SHAPE and float32.
        inflate, deflate: give memory to extents, and take it; extents that have it, or have none, are passed over.
        mapped: the extents that have memory. check: raises unless the books balance.
    """

    kv: torch.Tensor
    extents: ExtentMap
    inflate: Callable[[Iterable[int]], object]
    deflate: Callable[[Iterable[int]], object]
    mapped: Callable[[], Set[int]]
    check: Callable[[], object]


def elastic_equals_plain(cache: ElasticCache, new: int) -> None:
    """Generate with a plain cache and with one that has memory only where the sequence is; compare the tokens.

    Before each step other blocks get memory, are filled with NaN as another request would fill them, and lose it again.
    """
    device = cache.kv.device
    model = Transformer(device)
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).to(device)
    plain = generate(model, torch.zeros(SHAPE, device=device), table, new, lambda _: None)
    damaged = torch.zeros(SHAPE, device=device)
    assert plain != generate(model, damaged, table, new, lambda _: damaged[table[1]].zero_()), (
        "no token needs the cache"
    )
    steps = 0

    def before_step(end: int) -> None:
        nonlocal steps
        used = -(-end // BLOCK_TOKENS)
        mine = {cache.extents.extent_of(int(block)) for block in table[:used]}
        others = [cache.extents.extent_of(int(block)) for block in table[used:]]
        others = [extent for extent in others if extent not in mine][steps % 3 :: 3]
        cache.inflate([*mine, *others])
        for extent in others:
            for block in cache.extents.blocks_of(extent):
                cache.kv[block].fill_(float("nan"))
        cache.deflate(set(cache.mapped()) - mine)
        assert cache.mapped() == mine
        cache.check()
        steps += 1

    assert generate(model, cache.kv, table, new, before_step) == plain
