"""Decides whether a certified generator may be published, and whether it may take production's place, and does it.

Knows the contracts, neither torch nor Ray.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np

from training.bundle import FILES, MODE_FLOOR, OFF_MANIFOLD_EXCESS, Bundle, BundleError, Certificate, Reference, open_bundle
from training.registry import AliasChange, Registry, RegistryError

TV_LIMIT = 0.4  # total variation between real and generated shares of the cells, off-manifold included
TOLERANCE = 0.1  # by how much each figure of a new version may be worse than production's


class QualityRefused(ValueError):
    """A generator that is too bad to be `what`, published or promoted. The text lists every objection; `remedy` is a command."""

    def __init__(self, objections: list[str], remedy: str, what: str = "published") -> None:
        super().__init__("\n".join(objections))
        self.remedy, self.what = remedy, what


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


def quality_figures(reference: Reference, certificate: Certificate) -> dict[str, tuple[float, float]]:
    """name -> bounds (low, high) of a figure between 0 and 1 that is the worse the higher: the certificate's own simultaneous bounds
    of the cells' shares, taken to their ends. The real data's shares count as known.
    """
    real, n = reference.cell_share, certificate.count
    low, high = certificate.lower(certificate.cell_count, n), certificate.upper(certificate.cell_count, n)
    nearest, farthest = np.maximum(0, np.maximum(low - real, real - high)), np.maximum(np.abs(low - real), np.abs(high - real))
    modes = real[:-1] > 0
    least, most = (1 - np.minimum(1, (bound[:-1][modes] / real[:-1][modes]).min()) for bound in (high, low))
    return {
        "off-manifold share": (float(low[-1]), float(high[-1])),
        "total variation to the real mode shares": (float(nearest.sum() / 2), float(min(1.0, farthest.sum() / 2))),
        "shortfall of the worst-served mode": (float(least), float(most)),
    }


def promotion_objections(candidate: Bundle, production: Bundle, tolerance: float = TOLERANCE) -> list[str]:
    """In what the candidate's certificate is worse than production's by more than `tolerance`, one sentence each; empty: nothing.

    Only what both certificates prove counts: the candidate's lower bound beyond production's upper one. Each version is measured
    by its own eye against its own real data.
    """
    new, old = (quality_figures(bundle.reference, bundle.certificate) for bundle in (candidate, production))
    apart = "" if candidate.card.files["features.onnx"] == production.card.files["features.onnx"] else " (each by its own features.onnx)"
    return [
        f"{name}: {new[name][0]:.4f} to {new[name][1]:.4f} for {candidate.card.version}, {old[name][0]:.4f} to {old[name][1]:.4f} "
        f"for {production.card.version} in production{apart}; the tolerance is {tolerance:g}"
        for name in new
        if new[name][0] > old[name][1] + tolerance
    ]


def promote(
    registry: Registry,
    model: str,
    version: str,
    alias: str = "production",
    *,
    share: float = 0.0,
    act: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
    reason: str = "promote",
) -> AliasChange:
    """Point `alias` at a version. One that is proven worse than what is in production does not become production.

    Raises QualityRefused where the gate objects and `force` is not set; forced, the objections are kept in the registry's history.
    Canary and shadow are how a doubtful version is tried: they are not gated, and neither is what takes the place of a version that
    cannot be opened any more. Raises ValueError for a tolerance below 0.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more")
    before = registry.aliases(model).get("production")
    objections: list[str] = []
    if alias == "production" and before is not None and (wanted := registry.resolve(model, version)) != before:
        candidate = registry.open(model, wanted)
        with suppress(RegistryError, BundleError):  # damaged or deleted: there is nothing to compare with, and every reason to leave it
            objections = promotion_objections(candidate, registry.open(model, before), tolerance)
    if objections and not force:
        remedy = f"ganwatch promote {quote(version)} --model {quote(model)} --force --registry {quote(str(registry.root.resolve()))}"
        raise QualityRefused(objections, remedy, "promoted")
    return registry.set_alias(model, alias, version, reason=reason, share=share, act=act, forced="; ".join(objections) or None)
