"""Drawing follows the distribution, and a request's draws are its own."""

import numpy as np
import pytest
from support.drawing import drawing as request

from angelforge.runtime.distribution import processed_distribution
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; 0.9999 quantile for 9 degrees of freedom."""
    logits = np.random.default_rng(1).standard_normal(10).astype(np.float32)
    params = SamplingParams(temperature=0.8, seed=5)
    one = request(params)
    wanted = processed_distribution(logits, params, one.history) * 20_000
    found = np.bincount([int(sample(logits[None], [one])[0]) for _ in range(20_000)], minlength=10)
    assert ((found - wanted) ** 2 / wanted).sum() < 33.7


def test_a_request_draws_the_same_tokens_alone_and_among_others():
    rng = np.random.default_rng(2)
    every = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, top_k=5, seed=2),
        SamplingParams(temperature=1.5, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=3),
    ]
    steps = [rng.standard_normal((4, 300)).astype(np.float32) * 3 for _ in range(20)]
    together = [request(params, [i]) for i, params in enumerate(every)]
    joint = np.array([sample(logits, together) for logits in steps])
    for i, params in enumerate(every):
        alone = request(params, [i])
        assert [int(sample(logits[[i]], [alone])[0]) for logits in steps] == joint[:, i].tolist()


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1), SamplingParams(repetition_penalty=2)]
)
def test_a_row_without_finite_logits_gives_no_token_and_leaves_others_alone(params):
    logits = np.array([[0, np.nan, 1], [0, 5, 1]], np.float32)
    assert sample(logits, [request(params), request(SamplingParams())]).tolist() == [-1, 1]


def test_tokens_of_probability_zero_are_not_drawn_at_the_edges_of_the_unit_interval():
    class Edge:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    logits = np.array([[-np.inf, 0.0, 1.0, -np.inf]], np.float32)
    for point, token in ((0.0, 1), (np.nextafter(1.0, 0.0), 2)):
        one = request(SamplingParams(temperature=1), rng=Edge(point))
        assert sample(logits, [one]).tolist() == [token]
