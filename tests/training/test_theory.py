"""Every claim of theory.py holds, measured at a fraction of the steps."""

import math

import pytest
import torch

from training.theory import CLAIMS, Finding, plot, two_ways_to_be_wrong

QUICK = dict.fromkeys(CLAIMS, 0.25) | {"games_on_the_ring": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds(name):
    torch.set_num_threads(1)
    finding = CLAIMS[name].measure(QUICK[name])
    assert CLAIMS[name].holds(finding.numbers), finding.numbers
    assert all(len(x) == len(y) >= 2 for x, y in finding.curves.values())
    assert plot(finding, CLAIMS[name].words).size == (720, 420)


def test_half_of_the_modes_lost_costs_what_the_formula_says():
    numbers = two_ways_to_be_wrong(1.0).numbers
    assert numbers["drop_reverse"] == pytest.approx(math.log(2), abs=0.01)
    assert numbers["fake_forward"] == pytest.approx(math.log(2), abs=0.05)
    assert numbers["drop_forward"] > 5 and numbers["fake_reverse"] > 5


def test_a_picture_shows_each_curve_in_its_own_colour():
    finding = Finding({}, {"up": ([0.0, 1.0], [0.0, 1.0]), "down": ([0.0, 1.0], [1.0, 0.0])}, ("x", "y"))
    colours = {colour for _, colour in plot(finding, "two lines").getcolors(maxcolors=100_000)}
    assert {(0x1B, 0x6C, 0xA8), (0xD1, 0x49, 0x5B)} <= colours
