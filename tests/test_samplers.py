"""Properties of the samplers that hold for all rows, seeds, epochs and sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdev_trainer.core.seeding import permutation
from nbdev_trainer.data.samplers import (
    Balanced,
    Batches,
    ByLength,
    InOrder,
    Sampler,
    Shuffled,
    TokenBudget,
    Weighted,
    _log,
    cut,
    uniform,
)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
numbers = st.integers(0, 2**63 - 1)


@st.composite
def cases(draw):
    """Rows of a data set, the lengths, labels and weights of all its samples, and what cuts an epoch."""
    total = draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = generator.permutation(total)[: draw(st.integers(1, total))]
    return {
        "rows": torch.from_numpy(rows),
        "lengths": generator.integers(0, draw(st.integers(1, 30)), total),
        "labels": generator.integers(0, draw(st.integers(1, 6)), total),
        "weights": generator.random(total) + 1e-3,
        "batch_size": draw(st.integers(1, 70)),
        "drop_last": draw(st.booleans()),
        "seed": draw(numbers),
        "epoch": draw(numbers),
    }


def samplers(case):
    return [
        InOrder(),
        Shuffled(),
        Weighted(case["weights"]),
        Weighted(case["weights"], n=17),
        Weighted(case["weights"], replacement=False),
        Balanced(case["labels"]),
        Balanced(case["labels"], n=23),
        ByLength(case["lengths"]),
        ByLength(case["lengths"], pool=2),
        TokenBudget(case["lengths"], budget=40),
        TokenBudget(case["lengths"], budget=40, max_samples=3),
    ]


def epoch_of(sampler, case, **changes):
    case = case | changes
    names = "rows", "epoch", "seed", "batch_size", "drop_last"
    return sampler.batches(*(case[name] for name in names))


def lists(batches):
    return [batch.tolist() for batch in batches]


@quick
@given(cases())
def test_an_epoch_is_a_pure_function(case):
    before = case["rows"].clone()
    state = torch.get_rng_state()
    for sampler, again in zip(samplers(case), samplers(case), strict=True):
        assert lists(epoch_of(sampler, case)) == lists(epoch_of(again, case)), sampler
    assert torch.equal(before, case["rows"])
    assert torch.equal(state, torch.get_rng_state())


@quick
@given(cases())
def test_every_epoch_has_the_same_number_of_batches(case):
    for sampler in samplers(case):
        expected = sampler.n_batches(case["rows"], case["batch_size"], case["drop_last"])
        assert {len(epoch_of(sampler, case, epoch=epoch)) for epoch in range(4)} == {expected}, sampler
        assert len(lists(epoch_of(sampler, case))) == expected, sampler


@quick
@given(cases())
def test_each_sample_comes_exactly_once_where_that_is_promised(case):
    rows = sorted(case["rows"].tolist())
    for sampler in samplers(case):
        if isinstance(sampler, Balanced) or getattr(sampler, "replacement", False):
            continue
        assert sorted(sum(lists(epoch_of(sampler, case, drop_last=False)), [])) == rows, sampler
        kept = sum(lists(epoch_of(sampler, case, drop_last=True)), [])
        assert len(set(kept)) == len(kept) and set(kept) <= set(rows), sampler


@quick
@given(cases())
def test_only_the_given_rows_are_used_in_batches_of_the_right_size(case):
    rows, size = set(case["rows"].tolist()), case["batch_size"]
    for sampler in samplers(case):
        batches = lists(epoch_of(sampler, case))
        assert set(sum(batches, [])) <= rows, sampler
        assert all(batches), sampler
        if isinstance(sampler, TokenBudget):
            continue
        shorter = [len(batch) for batch in batches if len(batch) != size]
        assert len(shorter) <= (0 if case["drop_last"] else 1), sampler
        assert all(length < size for length in shorter), sampler


@quick
@given(cases())
def test_batches_can_be_had_from_anywhere(case):
    for sampler in samplers(case):
        batches = epoch_of(sampler, case)
        whole = lists(batches)
        assert isinstance(batches, Batches) and batches.order.dtype == torch.int64, sampler
        for start in range(len(whole) + 1):
            assert lists(batches[start:]) == whole[start:], sampler
        assert [batches[i].tolist() for i in range(len(batches))] == whole, sampler
        assert lists(batches[::-2]) == whole[::-2], sampler
        assert lists(batches[-3:-1]) == whole[-3:-1], sampler


@quick
@given(cases())
def test_a_budget_is_never_passed_and_no_batch_could_take_the_next_sample(case):
    budget, lengths = 40, case["lengths"]
    batches = lists(epoch_of(TokenBudget(lengths, budget), case))
    batches.sort(key=lambda batch: (lengths[batch].min(), lengths[batch].max(), -len(batch)))
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= budget
    for batch, following in zip(batches, batches[1:]):
        assert (len(batch) + 1) * lengths[following].min() > budget
    for batch in lists(epoch_of(TokenBudget(lengths, budget, max_samples=3), case)):
        assert len(batch) <= 3


@quick
@given(cases())
def test_balanced_shows_each_class_equally_often(case):
    labels, rows = case["labels"], case["rows"].numpy()
    classes = np.unique(labels[rows])
    for n in (None, 23):
        order = sum(lists(epoch_of(Balanced(labels, n=n), case, drop_last=False)), [])
        assert len(order) == (n or len(rows))
        counts = [int((labels[order] == one).sum()) for one in classes]
        assert max(counts) - min(counts) <= 1
        for one in classes:
            times = np.bincount(np.array(order, dtype=int), minlength=len(labels))
            within = times[[row for row in rows if labels[row] == one]]
            assert within.max() - within.min() <= 1


@quick
@given(cases())
def test_batches_by_length_hold_what_sorting_holds(case):
    """Sorted and cut, the batches of two epochs have the same lengths; only their order differs."""
    lengths, sampler = case["lengths"], ByLength(case["lengths"])
    epochs = [lists(epoch_of(sampler, case, epoch=epoch, drop_last=False)) for epoch in range(2)]
    shapes = [sorted(sorted(lengths[batch].tolist()) for batch in batches) for batches in epochs]
    ordered = np.sort(lengths[case["rows"].numpy()])
    expected = [
        ordered[i : i + case["batch_size"]].tolist() for i in range(0, len(ordered), case["batch_size"])
    ]
    assert shapes == [sorted(expected)] * 2


def test_shuffled_is_the_order_of_the_permutation():
    rows = torch.arange(50, 150)
    order = torch.cat(list(Shuffled().batches(rows, 3, 7, 16, False)))
    assert torch.equal(order, rows[permutation(100, 7, 3)])


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_decide_how_often(replacement):
    """Each sample comes first with the probability that its weight says: a test of chi squared."""
    weights = np.array([0.5, 1, 0, 2, 4, 0.5])
    sampler = Weighted(weights, n=1, replacement=replacement)
    counts = np.zeros(6)
    for epoch in range(4000):
        counts[sampler.order(torch.arange(6), epoch, 11).item()] += 1
    expected = 4000 * weights / weights.sum()
    assert counts[2] == 0
    used = expected > 0
    assert ((counts - expected)[used] ** 2 / expected[used]).sum() < 18.5  # 4 degrees of freedom, p = 0.001


def test_different_epochs_and_seeds_give_different_orders():
    case = {"rows": torch.arange(200), "batch_size": 16, "drop_last": False, "epoch": 0, "seed": 0}
    values = np.arange(200) % 17
    known = {"lengths": values, "labels": values, "weights": values + 1.0}
    for sampler in samplers(case | known)[1:]:
        orders = [
            lists(epoch_of(sampler, case, epoch=epoch, seed=seed)) for epoch in (0, 1) for seed in (0, 1)
        ]
        assert all(orders[i] != orders[j] for i in range(4) for j in range(i)), sampler


def test_the_order_is_the_same_on_every_machine():
    """Numbers written down once; a change here would change every run that is continued."""
    values = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    case = {"rows": torch.arange(8), "batch_size": 3, "drop_last": False, "epoch": 2, "seed": 5}
    found = {
        "weighted": lists(epoch_of(Weighted(values), case)),
        "without": lists(epoch_of(Weighted(values, replacement=False), case)),
        "balanced": lists(epoch_of(Balanced(values % 3), case)),
        "by length": lists(epoch_of(ByLength(values), case)),
        "budget": lists(epoch_of(TokenBudget(values, 10), case)),
    }
    assert found == EXPECTED


EXPECTED = {
    "weighted": [[5, 0, 7], [4, 5, 5], [0, 5]],
    "without": [[2, 5, 7], [4, 0, 3], [6, 1]],
    "balanced": [[2, 7, 4], [0, 1, 6], [5, 4]],
    "by length": [[7, 5], [1, 3, 6], [0, 2, 4]],
    "budget": [[4], [1, 3, 6], [7], [5], [0, 2]],
}


def test_the_logarithm_is_that_of_numpy():
    x = np.concatenate(
        [uniform(10_000, 0, 0), 2.0 ** np.arange(-1000, 1000, 7), 1 + 1e-3 * uniform(1000, 1, 0)]
    )
    np.testing.assert_allclose(_log(x), np.log(x), rtol=0, atol=3e-13)
    np.testing.assert_allclose(_log(x[:10_000]), np.log(x[:10_000]), rtol=0, atol=5e-15)


def test_columns_of_any_kind_are_taken_and_copied():
    with_gradient = torch.tensor([1.0, 2, 3], requires_grad=True)
    columns = [1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3]), with_gradient
    case = {"rows": torch.arange(3), "batch_size": 2, "drop_last": False, "epoch": 0, "seed": 0}
    orders = [lists(epoch_of(kind(column), case)) for kind in (Weighted, ByLength) for column in columns]
    assert orders[:4] == orders[:1] * 4 and orders[4:] == orders[4:5] * 4
    column = np.array([1.0, 2, 3])
    sampler = Weighted(column)
    column[:] = 0
    assert lists(epoch_of(sampler, case)) == orders[0]
    words = Balanced(["b", "a", "b"])
    assert lists(epoch_of(words, case)) == lists(epoch_of(Balanced([1, 0, 1]), case))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Weighted([]), "weights is empty list"),
        (lambda: Weighted([[1.0]]), "Expected one number for each sample"),
        (lambda: Weighted([1, -2]), "first: sample 1 has -2"),
        (lambda: Weighted([0.0, 0.0]), "all weights are 0"),
        (lambda: ByLength([1, float("inf")]), "first: sample 1 has inf"),
        (lambda: Balanced([1.5]), "a whole number or a text"),
        (lambda: Balanced([]), "labels is empty list"),
        (lambda: TokenBudget([3, 50], 40), "first: sample 1 has 50"),
        (lambda: TokenBudget([3], 40, max_samples=0), "max_samples 0"),
    ],
)
def test_a_wrong_column_is_answered_when_the_sampler_is_made(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_sampler_of_ones_own_needs_an_order():
    class Backwards(Sampler):
        def order(self, rows, epoch, seed):
            return rows.flip(0)

    assert lists(Backwards().batches(torch.arange(5), 0, 0, 2, False)) == [[4, 3], [2, 1], [0]]
    assert Backwards().n_batches(torch.arange(5), 2, True) == 2
    with pytest.raises(ValueError, match="batch_size is 0"):
        cut(torch.arange(5), 0, False)
