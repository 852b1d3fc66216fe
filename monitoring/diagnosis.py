"""What the evidence means, in words: which failure it is, what to do, and what silence does and does not prove.

Knows the groups of the e-detector and their names, no sample and no clock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from monitoring.audit import Compared
from training.bundle import Certificate
from training.drops import DropBounds, delay_of_loss


@dataclass(frozen=True)
class Verdict:
    """id: one of VERDICTS; words, advice: a sentence each; modes: those dropped; risen: those that come too often, where these are known and may be what
    is wrong; classes: those whose samples are fakes, where that shows
    class by class; null: the hypothesis that was refuted; stays: why another version would serve no better, where that is so."""

    id: str
    words: str
    advice: str
    modes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    risen: tuple[str, ...] = ()
    null: Literal["A", "B"] | None = None
    stays: str | None = None


VERDICTS: dict[str, Verdict] = {
    v.id: v
    for v in (
        Verdict("healthy", "Nothing distinguishes the served samples from those of the certified model.", "Nothing to do."),
        Verdict("warming_up", "Too few samples have been seen yet to say anything.", "Wait; traffic or probes will bring more."),
        Verdict(
            "demand_shift",
            "Clients ask for other classes than the model draws by itself. What it draws by itself looks as it was certified; of the classes that are asked for, modes and fakes were looked at, and look so too.",
            "Nothing to do for the model: what clients get has changed, and the gauges of what is served with it.",
        ),
        Verdict(
            "latent_fault",
            "Exact copies of samples keep coming: the model is fed latents that repeat or are too coarse.",
            "Look at how latents are drawn, at seeds and at the random generator's precision; roll back if the version is new.",
            null="A",
        ),
        Verdict(
            "mode_dropping",
            "The model has stopped producing, or produces far too rarely: {modes}.",
            "Roll back to the version before; then look for what changed in the model file or in its latents.",
            null="A",
        ),
        Verdict(
            "memorisation",
            "Samples come that are training data, or all but: the model repeats what it has learned by heart.",
            "Take it out of service where the training data are private; compare the newest samples with the data, then roll back.",
            null="A",
        ),
        Verdict(
            "off_manifold",
            "More samples than certified look unlike any real data.",
            "Look at the newest samples, roll back if they are junk; suspect wrong weights, preprocessing or precision.",
            null="A",
        ),
        Verdict(
            "within_mode_collapse",
            "Samples crowd around the typical more than certified: the modes are there, their variety is not.",
            "Look for truncated or narrowed latents, or a wrong checkpoint; roll back if the version is new.",
            null="A",
        ),
        Verdict(
            "quality_outside_tolerance",
            "The model behaves as it was certified, but that is too far from the real data: modes are missing or fakes abound.",
            "Do not roll back to a certificate like this one: train again, and publish a version that passes the gate.",
            null="B",
        ),
        Verdict(
            "world_moved",
            "The model does what it did when it passed as {version}, but the reference data have changed since: by these it is not good enough.",
            "Train on the new data and publish, or judge it by other data: ganwatch certify {version} --reference DATA; a rollback to {version} is judged by the old reference.",
            null="B",
            stays="an earlier version would only be judged by data that are no more",
        ),
        Verdict(
            "drift",
            "The served samples are no longer those of the certified model.",
            "Compare the served shares with the certified ones, then roll back or certify anew.",
            null="A",
        ),
        Verdict(
            "wrong_model",
            "Samples are not what the certified model makes of their latents: other weights, another runtime or other arithmetic is at work than was certified.",
            "Compare model.onnx, onnxruntime, device, precision and truncation of the server with the card; roll back if the version is new.",
        ),
    )
}

QUIET = ("healthy", "warming_up", "demand_shift")
"""Verdicts that are no alarm."""

EXPLANATIONS = {
    "duplicates": "latent_fault",
    "latents": "latent_fault",
    "nan": "off_manifold",
    "drop": "mode_dropping",
    "copies": "memorisation",
    "upper": "off_manifold",
    "lower": "within_mode_collapse",
    "wider": "off_manifold",
    "narrower": "within_mode_collapse",
    "nearer": "memorisation",
    "quality": "quality_outside_tolerance",
    "inflate": "drift",
    "shares": "drift",
    "moved": "drift",
}
"""Kind of evidence -> the failure that it names. The first one found explains the rest: what repeats has odd tails too, a mode
that comes as no number is gone, one that is gone inflates the others, and a model that left its certificate is judged by that before it is judged by the real
data."""


NO_NUMBERS = "What comes are no samples but NaN, infinity or numbers too large to be looked at, which the certified model does not make."

SHIFTS = {
    "narrower": "its normal numbers lie closer together than their law, as after a truncation that nobody asked for",
    "wider": "its normal numbers lie farther apart than their law",
    "shifted": "its normal numbers are not centred where their law is",
    "signs": "its signs are no fair coins",
    "dependent": "its coordinates depend on each other",
    "repeats": "the same latents come again and again",
    "impossible": "some of its numbers cannot occur at all",
}
"""What the evidence of `latents.py` says of the latents in use."""


def warming_up(*, given: bool) -> Verdict:
    """Before silence is called health. given: whether samples of classes that clients asked for were looked at already."""
    verdict = VERDICTS["warming_up"]
    return replace(verdict, words=verdict.words if not given else "Too few samples that the model drew by itself have been seen yet to call it healthy; of the classes that were asked for, modes and fakes were looked at, and raise no alarm.")


def latent_shift(shifts: Collection[str], misdrawn: tuple[int, int] | None) -> Verdict:
    """The latents in use are not those of the law: in the ways `shifts`, keys of SHIFTS; and of so many (wrong, looked at) not of their seed."""
    law = "; ".join(SHIFTS[shift] for shift in SHIFTS if shift in shifts)
    seeds = "" if misdrawn is None else f"{misdrawn[0]:,} of {misdrawn[1]:,} latents that were looked at are not those of their seed"
    follows = f"what the model is fed does not follow its law: {law}" if law else "that they break the law itself has not shown"
    words = f"{'; '.join(filter(None, (seeds, follows)))}."
    advice = "Compare how the replicas draw latents with the card (law, truncation, seeds), and the versions of what they run; start them anew with the certified release."
    # A replica draws latents for whatever version it serves: to go back would go on, a version per cool-down, and never help. Where all
    # that is known is that samples repeat it may, as what makes them repeat may lie inside model.onnx.
    stays = "it is the replicas that draw latents, and they would draw those of an earlier version no better"
    return replace(VERDICTS["latent_fault"], words=words[0].upper() + words[1:], advice=advice, stays=stays)


def wrong_model(*, golden: tuple[int, int], served: Compared, levels: bool) -> Verdict:
    """What a replay audit alone says. golden: certified samples asked for again and those that differed; served: samples that clients
    got, run again; levels: whether differences are counted in levels of a pixel."""
    verdict, found = VERDICTS["wrong_model"], []
    if golden[1]:
        found.append(f"{golden[1]:,} of {golden[0]:,} certified samples come back different when they are asked for again")
    if served.different:
        by = f"{served.worst:.0f} levels" if levels else f"{served.worst:.3g}"
        found.append(f"{served.different:,} of {served.checked:,} served samples differ from what the certified model makes of their latents, by up to {by}")
    near = " They are the same samples, computed otherwise." if served.near else ""
    words = f"{' and '.join(found)}: {verdict.words.partition(': ')[2]}{near}" if found else verdict.words
    advice = f"Look at precision, quantisation and the runtime first. {verdict.advice}" if served.near else verdict.advice
    return replace(verdict, words=words, advice=advice)


def diagnose(
    groups: Collection[str], modes: tuple[str, ...], *, classes: tuple[str, ...] = (), passed_as: str | None = None, misdrawn: tuple[int, int] | None = None
) -> Verdict:
    """The verdict on an alarm from the groups that are named for it; `modes` and `classes` in the model's order.

    passed_as: a version of this very generator that the gate let pass by another reference, if there is one: then quality out of
    tolerance is the reference's doing. misdrawn: latents that were not of their seed, and those looked at, where there are any:
    that goes before all that samples say. There is at least one group, or `misdrawn`.
    """
    kinds = {group.partition(":")[0] for group in groups}
    if misdrawn is not None or ("latents" in kinds and "duplicates" not in kinds):
        return latent_shift({group.partition(":")[2] for group in groups if group.startswith("latents:")}, misdrawn)
    verdict = VERDICTS[next(EXPLANATIONS[kind] for kind in EXPLANATIONS if kind in kinds)]
    if verdict.id == "quality_outside_tolerance" and passed_as is not None:
        moved = VERDICTS["world_moved"]
        return replace(moved, words=moved.words.format(version=passed_as), advice=moved.advice.format(version=passed_as))
    dropped, risen = (tuple(name for name in modes if f"{kind}:{name}" in groups) for kind in ("drop", "inflate"))
    words = verdict.words.format(modes=", ".join(dropped))
    if "nan" in kinds and verdict.id == "off_manifold":
        words = NO_NUMBERS
    fault = "nan" if "nan" in kinds else "upper"
    asked = tuple(name for c, name in enumerate(classes) if f"{fault}:{c}" in groups) if verdict.id == "off_manifold" else ()
    risen = risen if verdict.id in ("drift", "off_manifold", "within_mode_collapse") and "nan" not in kinds and not asked else ()
    if risen:  # what is usual of one mode may be odd of all
        words = f"{words} These come too often{'' if verdict.id == 'drift' else ', which may be all there is to it'}: {', '.join(risen)}."
    if asked:
        words = f"{words} So it is where these are asked for: {', '.join(asked)}."
    return replace(verdict, words=words, modes=dropped, classes=asked, risen=risen)


def replaced(verdict: Verdict, other: Verdict) -> Verdict:
    """The verdict where, besides, not one certified sample comes back: `other`, that another model serves, of which this is what one sees.

    But for what says more than that: repeating latents, which change every sample too, and copies of training data.
    """
    if verdict.id in ("latent_fault", "memorisation"):
        return verdict
    return replace(other, words=f"{other.words} What shows: {verdict.words}", modes=verdict.modes, classes=verdict.classes, risen=verdict.risen, null=verdict.null)


def detectable(certificate: Certificate, bounds: DropBounds, modes: tuple[str, ...], *, monitored: int, threshold: float, given: int = 0) -> str:
    """How small a fault would have been seen by now, in words, by samples of the whole law, of which `monitored` came since the detectors
    started. Of a class' own samples, `given` of them, no more is said than that they do not count here: each is seen by its class."""
    percent = np.arange(100, 0, -1)
    delays = delay_of_loss(certificate, bounds, percent / 100, threshold=threshold)
    watched = np.isfinite(delays[0])
    if not watched.any():
        return "The loss of a mode would never be seen: the certified model hardly produces any of them."
    blind = [name for name, seen in zip(modes, watched, strict=True) if not seen]
    note = f" The {given:,} of classes that were asked for do not count here." if given else ""
    note += f" Not watched, since the certified model hardly produces them: {', '.join(blind)}." if blind else ""
    slowest = delays[:, watched].max(axis=1)
    if monitored < slowest[0]:
        return f"The loss of a whole mode is seen within about {slowest[0]:,.0f} samples; {monitored:,} were monitored.{note}"
    smallest = percent[slowest <= monitored].min()
    return f"By now, after {monitored:,} samples, a mode that had lost {smallest} % of its share from the start would have been seen, whichever it is.{note}"
