"""Two, three and four processes train what one trains."""

import by_hand
import pytest
import scenarios
import torch


@pytest.fixture(scope="module")
def one():
    torch.set_num_threads(1)
    return {scenario.__name__: scenario() for scenario in scenarios.SCENARIOS}


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request, together):
    return together(scenarios.run_all, processes=request.param)


def assert_close(ours, theirs, path):
    if isinstance(ours, torch.Tensor):
        scale = ours.abs().max().clamp_min(1e-30)
        difference = ((ours - theirs).abs().max() / scale).item()
        assert difference <= 1e-12, f"{path} differs by {difference:.2g} of its size"
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), path
        for name in ours:
            assert_close(ours[name], theirs[name], f"{path} {name}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for k, pair in enumerate(zip(ours, theirs)):
            assert_close(*pair, f"{path} {k}")
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=1e-12, nan_ok=True), path
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("name", [one.__name__ for one in scenarios.SCENARIOS])
def test_the_weights_metrics_and_counters_are_those_of_one_process(one, several, name):
    assert_close(one[name], several[name], name)
    counted = [key for key in one[name]["metrics"] if "accuracy" in key or "f1" in key]
    for key in counted:
        assert one[name]["metrics"][key] == several[name]["metrics"][key], key


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])  # test_divided has three, too
def divided(request, together):
    return together(scenarios.run_divided, [], processes=request.param)


@pytest.mark.parametrize("name", [one.__name__ for one in scenarios.DIVIDED])
def test_divided_weights_train_as_whole_ones(one, divided, name):
    assert_close(one[name], divided[name], name)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_single_precision_is_that_of_a_loop_written_by_hand_bit_for_bit(together, accumulate):
    theirs, ours = together(by_hand.both, accumulate)
    assert all(torch.equal(*pair) for pair in zip(theirs, ours))
