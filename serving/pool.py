"""Samples drawn ahead while the device is idle, so that small requests without a seed are answered from memory.

They are what such a request would have got: each block has a seed of its own that the server drew, and every answer says which
rows of it these are. Rows of one block go to several clients, none twice. Knows nothing of requests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from numpy import ndarray

from serving.batcher import Spare
from serving.request import server_seed
from serving.sampler import Sampler, Window

_BLOCK = 256  # rows drawn at a time, all of one seed
_SMALL = 64  # a larger request fills a batch anyway


@dataclass
class _Stock:
    blocks: deque[tuple[Window, ndarray]] = field(default_factory=deque)
    left: int = 0  # rows in the blocks
    drawing: bool = False
    broken: bool = False  # a sampler that failed is not asked again

    def drop(self) -> None:
        window, _ = self.blocks.popleft()
        self.left -= window.count


class Pool:
    """`rows`: samples held for each version, at most; 0 switches the pool off. `limit_bytes`: of all of them together."""

    def __init__(self, rows: int = 0, limit_bytes: int = 64 << 20) -> None:
        self.rows, self.limit_bytes = rows, limit_bytes
        self.hits: Counter[str] = Counter()  # model -> requests answered from memory
        self._stocks: dict[Sampler, _Stock] = {}

    def keep(self, samplers: Iterable[Sampler]) -> None:
        """Hold samples of these from now on; those of all others are gone when this returns."""
        self._stocks = {sampler: self._stocks.get(sampler, _Stock()) for sampler in samplers if self.rows >= _BLOCK}

    def take(self, sampler: Sampler, count: int) -> tuple[Window, ndarray] | None:
        """`count` rows that nobody has got, of one seed and next to each other; None where they must be drawn."""
        stock = self._stocks.get(sampler)
        if stock is None or count > _SMALL:
            return None
        while stock.blocks and stock.blocks[0][0].count < count:
            stock.drop()
        if not stock.blocks:
            return None
        window, rows = stock.blocks[0]
        if window.count == count:
            stock.drop()
        else:
            stock.blocks[0] = window.part(count, window.count - count), rows[count:]
            stock.left -= count
        self.hits[sampler.card.model] += 1
        return window.part(0, count), rows[:count]

    def want(self) -> Spare | None:
        """The next block to be drawn: for the version that has least. None where all have enough or memory is full."""
        hungry = [(s.left, sampler) for sampler, s in self._stocks.items() if self.has_room(sampler) and not (s.drawing or s.broken)]
        if not hungry:
            return None
        _, sampler = min(hungry, key=lambda pair: pair[0])
        if self.bytes + _bytes(sampler) > self.limit_bytes:
            return None
        stock = self._stocks[sampler]
        stock.drawing = True
        window = Window(server_seed(), 0, _BLOCK)

        def done(rows: ndarray | None) -> None:
            stock.drawing = False
            if rows is None:
                stock.broken = True
            else:  # if the stock was given up meanwhile, nobody will look into it
                stock.blocks.append((window, rows))
                stock.left += window.count

        return Spare(sampler, window, done)

    def has_room(self, sampler: Sampler) -> bool:
        """Whether another block of `sampler` fits."""
        return self.left(sampler) + _BLOCK <= self.rows

    @property
    def bytes(self) -> int:
        # A block that is partly used is held whole.
        return sum(len(stock.blocks) * _bytes(sampler) for sampler, stock in self._stocks.items())

    def left(self, sampler: Sampler) -> int:
        """Rows held of `sampler`."""
        stock = self._stocks.get(sampler)
        return stock.left if stock else 0


def _bytes(sampler: Sampler) -> int:
    """Of a block, with the latents that its rows were made of."""
    return _BLOCK * (sampler.sample_bytes + 4 * sampler.card.latent.dim)
