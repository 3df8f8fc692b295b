"""Drawing follows the distribution, and a request's draws are its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.drawing import drawing as request

from angelforge.runtime.distribution import processed_distribution
from angelforge.runtime.sampler import draw, sample
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


class Edge:
    """A generator that gives one number, and counts how often."""

    def __init__(self, value):
        self.value, self.count = value, 0

    def random(self):
        self.count += 1
        return self.value


def test_tokens_of_probability_zero_are_not_drawn_at_the_edges_of_the_unit_interval():
    logits = np.array([[-np.inf, 0.0, 1.0, -np.inf]], np.float32)
    for point, token in ((0.0, 1), (np.nextafter(1.0, 0.0), 2)):
        one = request(SamplingParams(temperature=1), rng=Edge(point))
        assert sample(logits, [one]).tolist() == [token]


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.4}], ids=str)
def test_a_token_is_the_first_in_the_order_of_ids_that_passes_its_part(params):
    """Not in that of falling logits: of the weights 1/4, 1, 1/2 the least likely comes first."""
    logits = np.log(np.array([[0.25, 1e-30, 1, 0.5]], np.float32))
    params = SamplingParams(temperature=1, **params)
    shares = processed_distribution(logits[0], params)
    points = (np.arange(100) + 0.5) / 100
    found = [int(sample(logits, [request(params, rng=Edge(point))])[0]) for point in points]
    assert found == np.searchsorted(np.cumsum(shares), points, side="right").tolist()
    assert found == sorted(found)


@pytest.mark.parametrize(("params", "count"), [({}, 0), ({"top_k": 1}, 1), ({"top_p": 0.01}, 1), ({"top_k": 2}, 1)])
def test_a_token_that_is_not_greedy_takes_one_number_whatever_the_choice(params, count):
    for logits in ([0, 3, 1], [0, np.nan, 1]):
        rng = Edge(0.5)
        sample(
            np.array([logits], np.float32),
            [request(SamplingParams(temperature=1.0 if params else 0.0, **params), rng=rng)],
        )
        assert rng.count == count


@given(
    st.integers(1, 5000),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.001, 0.3, 1.0]),
    st.one_of(st.sampled_from([0.0, float(np.nextafter(1.0, 0.0))]), st.floats(0, 1, exclude_max=True)),
)
def test_the_first_id_is_taken_at_which_the_running_sum_passes_the_mark(size, seed, share, point):
    """However many ids there are; whole weights, of which few are above 0, make every sum exact."""
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) < share, rng.integers(1, 9, size), 0).astype(np.float32)
    weights[rng.integers(size)] = 1
    ids = np.sort(rng.choice(10_000, size, replace=False))
    sums = np.cumsum(weights, dtype=np.float64)
    assert draw(ids, weights, Edge(point)) == ids[np.flatnonzero(sums > point * sums[-1])[0]]


@given(st.integers(1, 4000), st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True))
def test_rounding_draws_nothing_without_weight(size, seed, point):
    """Weights of every magnitude, where blocks' sums and running sums differ."""
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) < 0.5, np.exp(-rng.random(size) * 60), 0).astype(np.float32)
    weights[rng.integers(size)] = 1
    taken = draw(np.arange(size), weights, Edge(point))
    sums = np.cumsum(weights, dtype=np.float64)
    assert weights[taken] > 0
    assert sums[taken] >= point * sums[-1] * (1 - 1e-12)
    assert sums[taken] - weights[taken] <= point * sums[-1] * (1 + 1e-12)
