"""The measuring stick and the monitor's gauges against torch-fidelity, by the numbers that `make reference-values` wrote."""

import json

import numpy as np
import pytest

from training.moments import frechet
from monitoring.points import NEIGHBOURS, Cloud, kernel_distance
from tests.training.reference_values import FILE, SEED, SHARE, SUBSETS, cases
from training.evaluation import fid, kid, prdc

CASES, GOLDEN = cases(), json.loads(FILE.read_text())


def near(value):
    return pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.fixture(params=CASES)
def case(request):
    real, fake = CASES[request.param]
    golden = GOLDEN["arrays"][request.param]
    assert golden["checksum"] == pytest.approx(real.sum() + fake.sum(), rel=1e-12), "other arrays than those of the file; run make reference-values"
    return real, fake, golden


def test_the_measuring_stick(case):
    real, fake, golden = case
    size = min(len(real), len(fake))
    assert fid(real, fake) == near(golden["fid"])
    assert kid(real, fake, subsets=SUBSETS, size=int(size * SHARE), seed=SEED) == near((golden["kid"], golden["kid_deviation"]))
    for k, (precision, recall) in golden["prc"].items():
        found = prdc(real, fake, k=int(k))
        assert (found["precision"], found["recall"]) == near((precision, recall))


def test_the_frechet_distance_is_exact_where_covariances_are_singular(case):
    """Of samples the trace of (S1 S2)^1/2 is the nuclear norm of X Y^T: no covariance is formed, and nothing is lost."""
    real, fake, _ = case
    x, y = ((f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (real, fake))
    means = np.sum((real.mean(axis=0) - fake.mean(axis=0)) ** 2)
    exact = means + np.sum(x**2) + np.sum(y**2) - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()
    assert fid(real, fake) == pytest.approx(exact, rel=1e-10)


def test_the_gauges(case):
    real, fake, golden = case
    size = min(len(real), len(fake))
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, fake)]
    assert frechet(*moments[0], *moments[1])[0] == near(golden["fid"])
    assert kernel_distance(real[:size], fake[:size]) == near(golden["kid_of_all"])
    found = Cloud(real).neighbours(fake)
    assert [found["precision"], found["recall"]] == near(golden["prc"][str(NEIGHBOURS)])
