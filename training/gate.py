"""Decides whether a certified generator may be published, and publishes it. Knows the contracts, neither torch nor Ray."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np

from training.bundle import FILES, MODE_FLOOR, OFF_MANIFOLD_EXCESS, Bundle, Certificate, Reference, open_bundle
from training.registry import Registry

TV_LIMIT = 0.4  # total variation between real and generated shares of the cells, off-manifold included


class QualityRefused(ValueError):
    """A complete bundle whose generator is too bad to publish. The text lists every objection; `remedy` is a command."""

    def __init__(self, objections: list[str], remedy: str) -> None:
        super().__init__("\n".join(objections))
        self.remedy = remedy


def quality_objections(reference: Reference, certificate: Certificate, modes: tuple[str, ...]) -> list[str]:
    """What speaks against this generator, one sentence each; empty: nothing.

    Only what the certificate proves counts: a mode is dropped when even the upper bound of its share is below MODE_FLOOR of
    the real one, and off-manifold samples are too many when even the lower bound is above that of the real data by OFF_MANIFOLD_EXCESS. What passes
    here is what the monitor's null B allows, which tests the same two bounds on what is served.
    """
    real, n = reference.cell_share, certificate.count
    served = certificate.cell_count / n
    low, high = certificate.lower(certificate.cell_count, n), certificate.upper(certificate.cell_count, n)
    objections = [
        f"mode {mode} is dropped: it is {served[k]:.2%} of {n:,} samples (at most {high[k]:.2%}) "
        f"and {real[k]:.2%} of the real data; the floor is {MODE_FLOOR * real[k]:.2%}"
        for k, mode in enumerate(modes)
        if high[k] < MODE_FLOOR * real[k]
    ]
    if low[-1] > (limit := real[-1] + OFF_MANIFOLD_EXCESS):
        objections.append(f"at least {low[-1]:.1%} of samples are off the manifold of the real data, and {real[-1]:.1%} of these; the limit is {limit:.1%}")
    if (tv := float(np.abs(served - real).sum() / 2)) > TV_LIMIT:
        objections.append(f"total variation between real and generated mode shares is {tv:.3f}; the limit is {TV_LIMIT}")
    return objections


def publish(directory: str | os.PathLike[str], registry: Registry, *, model: str | None = None, force: bool = False) -> Bundle:
    """Publish the complete bundle at `directory` as the next version of `model` (default: the one its card names).

    Raises BundleError where it is incomplete or altered, and QualityRefused where the gate objects and `force` is not set;
    forced, the objections are kept in the card.
    """
    bundle = open_bundle(directory)
    objections = quality_objections(bundle.reference, bundle.certificate, bundle.card.modes)
    objections += [f"training ended with an alarm: {reason}" for reason in bundle.card.training.get("failing", [])]
    if objections and not force:
        remedy = f"ganwatch publish {quote(str(Path(directory).resolve()))} --force --registry {quote(str(registry.root.resolve()))}"
        raise QualityRefused(objections, remedy)
    card = replace(bundle.card, model=model or bundle.card.model, forced="; ".join(objections) or None)
    with registry.staging(card.model) as staged:
        for name in FILES:
            shutil.copyfile(Path(directory) / name, staged / name)
        return registry.publish(staged, card)
