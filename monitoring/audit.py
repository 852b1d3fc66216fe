"""The replay audit: the certificate's golden samples, asked of the server again. No statistics: right weights in a right runtime
give the same samples for the same latents, so a sample that comes back different is proof by itself.

It asks as any client does, by seed and offset. It does not know what a difference means, only that there is one.
"""

from __future__ import annotations

import io

import httpx
import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from training.bundle import Bundle

LEVELS = 1  # uint8 levels by which batches and devices may differ
FLOAT_TOLERANCE = 1e-3  # of the largest golden value; TF32 keeps ten bits, quantised weights do not come near


def differing(golden: ndarray, answered: ndarray) -> Bool[ndarray, "g"]:
    """Which rows of `answered` are not the golden ones; every row where shape or type differ."""
    if answered.shape != golden.shape or answered.dtype != golden.dtype:
        return np.ones(len(golden), bool)
    tolerance = LEVELS if golden.dtype == np.uint8 else FLOAT_TOLERANCE * np.abs(golden).max(initial=0.0)
    close = np.abs(answered.astype(np.float64) - golden.astype(np.float64)) <= tolerance  # NaN is not close
    return ~close.reshape(len(golden), -1).all(axis=1)


def replay(client: httpx.Client, serving_url: str, bundle: Bundle) -> tuple[int, int]:
    """Ask for every golden sample of the version. Returns how many were compared and how many differ.

    Raises httpx.HTTPError, and ValueError where the answer is no array of that version.
    """
    card, certificate = bundle.card, bundle.certificate
    url = f"{serving_url}/v1/models/{card.model}/versions/{card.version}/sample"
    mismatched = 0
    for seed, offset, golden in zip(certificate.golden_seed, certificate.golden_offset, certificate.golden_sample, strict=True):
        answer = client.post(url, json={"n": 1, "seed": int(seed), "offset": int(offset)}).raise_for_status()
        if (version := answer.headers.get("X-Ganwatch-Version", card.version)) != card.version:
            raise ValueError(f"{url} answered for version {version}")
        try:
            answered = np.load(io.BytesIO(answer.content), allow_pickle=False)
        except (EOFError, OSError) as error:
            raise ValueError(f"{url} answered with what is no npy: {error}") from error
        mismatched += int(differing(golden[None], answered).sum())
    return len(certificate.golden_seed), mismatched
