"""Every claim of theory.py holds, measured at a fraction of the steps."""

import math

import numpy as np
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
    assert all(np.shape(y)[-1] == len(x) >= 2 for x, y in finding.curves.values())
    figure = plot(finding, CLAIMS[name].words)
    assert len(figure.get_axes()) == 1 + len(finding.clouds) and all(axes.get_xlabel() for axes in figure.get_axes())


def test_half_of_the_modes_lost_costs_what_the_formula_says():
    numbers = two_ways_to_be_wrong(1.0).numbers
    assert numbers["drop_reverse"] == pytest.approx(math.log(2), abs=0.01)
    assert numbers["fake_forward"] == pytest.approx(math.log(2), abs=0.05)
    assert numbers["drop_forward"] > 5 and numbers["fake_reverse"] > 5


def test_a_figure_says_what_it_shows(tmp_path):
    curves = {"one run": ([0.0, 1.0], [0.0, 1.0]), "two runs": ([0.0, 1.0], [[1.0, 0.0], [3.0, 2.0]])}
    points = {"here": np.zeros((5, 2)), "there": np.ones((5, 2))}
    figure = plot(Finding({}, curves, ("steps", "error, nats"), levels={"log 2": 0.69}, clouds=points), "a claim")
    figure.savefig(tmp_path / "claim.png")
    above, *panels = figure.get_axes()
    assert figure.get_suptitle() == "a claim" and (above.get_xlabel(), above.get_ylabel()) == ("steps", "error, nats")
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["one run", "two runs", "log 2"]
    assert above.lines[1].get_ydata().tolist() == [2.0, 1.0]  # the mean; the band says how far they are apart
    assert len(above.collections) == 1 and [panel.get_title() for panel in panels] == ["here", "there"]
    assert [len(panel.collections[0].get_offsets()) for panel in panels] == [5, 5]
