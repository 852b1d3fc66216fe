"""A served model as a torch dataset: rows of one seed, split among the workers of a DataLoader, the same in every epoch.

The only file of serving that touches torch, and only where a dataset is built: whoever wants one has torch already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from serving.client import Client

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import IterableDataset


def dataset(url: str, model: str, n: int, *, size: int | None = None, **law: Any) -> IterableDataset[Tensor]:
    """`n` samples of `model`, one tensor each as they are served: uint8 [h, w, c] of images, float32 [d] of vectors.

    `size`: rows fetched at a time; by default 4,096, or as many as are 64 MiB. `law`: what Client.sample takes, but no list of
    labels, no `z` and no `interpolate`. Seed and version are fixed now, so that all workers and epochs agree; each process of a
    distributed training asks for rows of its own by `offset`. Raises what Client raises.
    """
    from torch import from_numpy
    from torch.utils.data import IterableDataset, get_worker_info

    with Client(url) as client:
        first = client.sample(model, 1, **law)
    size = size or max(1, min(4096, 2**26 // first.array.nbytes))
    law = {**law, "seed": first.seed, "offset": first.offset, "version": first.version}

    class Generated(IterableDataset):
        def __len__(self) -> int:
            return n

        def __iter__(self) -> Iterator[Tensor]:
            worker = get_worker_info()
            share, index = (worker.num_workers, worker.id) if worker else (1, 0)
            start, end = index * n // share, (index + 1) * n // share
            if start == end:
                return
            with Client(url, retries=5) as client:
                for page in client.pages(model, end - start, size=size, **{**law, "offset": law["offset"] + start}):
                    yield from from_numpy(page.array)

        def __reduce__(self) -> tuple[Any, ...]:  # for workers that are spawned
            return _again, (url, model, n, size, law)

    return Generated()


def _again(url: str, model: str, n: int, size: int, law: dict[str, Any]) -> IterableDataset[Tensor]:
    return dataset(url, model, n, size=size, **law)
