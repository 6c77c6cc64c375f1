"""Focal, Dice and quantile losses: beside formulas written out, and in the loop: counts, weights, accumulation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import Batch, BinaryFocalLoss, DiceLoss, FocalLoss, QuantileLoss, StepOutput, SupervisedStep, Trainer
from nbdev_trainer.loop.steps import CountedLoss

torch.manual_seed(0)
N = 20
INPUTS = torch.randn(N, 5, dtype=torch.float64)
CLASSES = torch.randint(0, 3, (N,))
SOME = CLASSES.clone()
SOME[::6] = -1
LABELS = torch.randint(0, 2, (N, 3)).double()
MASKS = torch.randint(0, 3, (N, 2, 4))
WEIGHT = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
SAMPLE_WEIGHTS = torch.rand(N, dtype=torch.float64) + 0.2
HOLES = MASKS.clone()
HOLES[::4, :, 2:] = 9


class Areas(nn.Module):
    "Scores (batch, 3, 2, 4)"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 24)

    def forward(self, inputs): return self.head(inputs).view(-1, 3, 2, 4)


def scores_for(n_outputs):
    return lambda: nn.Linear(5, n_outputs)


CASES = {
    "focal": (FocalLoss(2.0), scores_for(3), CLASSES),
    "focal, ignoring": (FocalLoss(1.5, ignore_index=-1), scores_for(3), SOME),
    "focal, class weights": (FocalLoss(2.0, weight=WEIGHT, ignore_index=-1), scores_for(3), SOME),
    "focal, pixels": (FocalLoss(2.0, ignore_index=9), Areas, HOLES),
    "binary focal": (BinaryFocalLoss(2.0, alpha=0.25), scores_for(3), LABELS),
    "dice": (DiceLoss(), Areas, MASKS),
    "dice, ignoring": (DiceLoss(ignore_index=9, background=False), Areas, HOLES),
    "quantile": (QuantileLoss([0.1, 0.9]), scores_for(2), INPUTS[:, 0]),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), scores_for(3), CLASSES),
    "label smoothing, all": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2, ignore_index=-1), scores_for(3), SOME),
    "soft targets": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), scores_for(3), LABELS.softmax(1)),
}


def model_of(make):
    torch.manual_seed(1)
    return make().double()


def trained(case, sizes, accumulate, weights=None):
    "The model after one window over all samples, divided into batches of the given sizes"
    loss_fn, make, targets = CASES[case]
    model = model_of(make)
    ids = torch.arange(N).split(sizes)
    data = [Batch(INPUTS[i], targets[i], weights=None if weights is None else weights[i]) for i in ids]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(model, SupervisedStep(loss_fn), optimizer, accumulate=accumulate)
    trainer.fit(data, n=1)
    return model, trainer


def difference(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "sample weights"])
@pytest.mark.parametrize("case", CASES)
def test_accumulating_uneven_batches_equals_the_large_batch(case, weighted):
    weights = SAMPLE_WEIGHTS if weighted else None
    whole, _ = trained(case, N, 1, weights)
    for sizes in ([1] * N, [9, 9, 2], [13, 7]):
        parts, trainer = trained(case, sizes, len(sizes), weights)
        assert trainer.state.step == 1
        assert difference(whole, parts) < 1e-14, sizes
    assert difference(whole, model_of(CASES[case][1])) > 1e-4  # something was learned


@pytest.mark.parametrize("case", CASES)
def test_the_large_batch_is_a_plain_step_with_the_loss_itself(case):
    loss_fn, make, targets = CASES[case]
    whole, trainer = trained(case, N, 1)
    by_hand = model_of(make)
    loss = loss_fn(by_hand(INPUTS), targets)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()
    assert difference(whole, by_hand) < 1e-15
    assert trainer.state.metrics["train_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("case", CASES)
def test_equal_sample_weights_change_nothing_and_zeros_leave_samples_out(case):
    plain, _ = trained(case, N, 1)
    assert difference(plain, trained(case, N, 1, torch.full((N,), 2.5, dtype=torch.float64))[0]) < 1e-14
    loss_fn, make, targets = CASES[case]
    kept = torch.arange(N) % 3 > 0
    weighted = StepOutput(predictions=model_of(make)(INPUTS))
    CountedLoss(loss_fn)(weighted, Batch(INPUTS, targets, N, weights=kept.double()))
    assert weighted.loss.item() == pytest.approx(loss_fn(model_of(make)(INPUTS[kept]), targets[kept]).item())


@pytest.mark.parametrize("case", CASES)
def test_losses_of_single_samples_are_those_of_batches_of_one(case):
    loss_fn, make, targets = CASES[case]
    model = model_of(make)
    trainer = Trainer(model, SupervisedStep(loss_fn), torch.optim.SGD(model.parameters(), lr=0.1))
    losses = trainer.predict([(INPUTS[:9], targets[:9]), (INPUTS[9:], targets[9:])]).losses
    with torch.no_grad():
        alone = torch.stack([loss_fn(model(INPUTS[i:i + 1]), targets[i:i + 1]) for i in range(N)])
    assert losses.shape == (N,)
    assert torch.allclose(losses, alone, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_focal_loss_without_focus_is_torchs_cross_entropy_to_the_last_bit_of_its_gradient():
    scores = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 3, (8, 4))
    targets[2, 1] = -100
    for weight in (None, WEIGHT):
        found = [torch.autograd.grad(loss(scores, targets), scores)[0]
                 for loss in (FocalLoss(0, weight=weight), nn.CrossEntropyLoss(weight))]
        assert torch.allclose(*found, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_losses_have_the_gradient_of_their_formula(gamma):
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets, answers = torch.tensor([0, 2, 1, 1, 0]), torch.randint(0, 2, (5, 3)).double()
    assert torch.autograd.gradcheck(lambda one: FocalLoss(gamma, weight=WEIGHT)(one, targets), scores)
    assert torch.autograd.gradcheck(lambda one: BinaryFocalLoss(gamma, alpha=0.3)(one, answers), scores)
    chance = scores.softmax(1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(FocalLoss(gamma)(scores, targets), (-(1 - chance) ** gamma * chance.log()).mean())


def test_losses_are_finite_where_the_model_is_certain():
    for value in (-200.0, 200.0):
        scores = torch.tensor([[value, 0.0]], requires_grad=True)
        for loss in (FocalLoss(0.5)(scores, torch.tensor([0])),
                     BinaryFocalLoss(0.5)(scores, torch.tensor([[1.0, 0.0]])),
                     DiceLoss()(scores[..., None], torch.tensor([[1]]))):
            gradient, = torch.autograd.grad(loss, scores)
            assert loss.isfinite() and gradient.isfinite().all()


def test_dice_of_a_sample_is_twice_the_overlap_over_both_areas():
    scores, each = torch.randn(3, 3, 4, 5), DiceLoss(reduction="none", smooth=1e-3)
    masks = torch.randint(0, 3, (3, 4, 5))
    for i in range(3):
        shares, values = scores[i].softmax(0), []
        for k in range(3):
            area = (masks[i] == k).float()
            values.append((2 * (shares[k] * area).sum() + 1e-3) / ((shares[k] + area).sum() + 1e-3))
        assert each(scores, masks)[i].item() == pytest.approx(1 - torch.stack(values).mean().item(), rel=1e-5)


def test_ignored_pixels_have_no_gradient():
    for loss_fn in (DiceLoss(ignore_index=9), FocalLoss(ignore_index=9)):
        scores = torch.randn(N, 3, 2, 4, requires_grad=True)
        loss_fn(scores, HOLES).backward()
        hidden = (HOLES == 9)[:, None].expand_as(scores)
        assert (scores.grad[hidden] == 0).all() and (scores.grad[~hidden] != 0).all()


def test_volumes_and_lines_are_areas_too():
    for shape in ((4,), (4, 3, 2)):
        scores, targets = torch.randn(2, 3, *shape), torch.randint(0, 3, (2, *shape))
        assert DiceLoss(reduction="none")(scores, targets).shape == (2,)
        assert FocalLoss(reduction="none")(scores, targets).shape == targets.shape


def test_quantile_loss_is_the_pinball_loss_of_each_quantile():
    predictions, targets = torch.randn(6, 4, 3), torch.randn(6, 4)
    total = 0.0
    for k, q in enumerate((0.1, 0.5, 0.9)):
        error = targets - predictions[..., k]
        total = total + torch.where(error > 0, q * error, (q - 1) * error).mean() / 3
    assert torch.allclose(QuantileLoss()(predictions, targets), total)
    assert torch.allclose(QuantileLoss()(predictions, targets[..., None]), total)


def test_losses_move_with_the_module_and_keep_no_state_but_class_weights():
    assert list(FocalLoss(weight=WEIGHT).state_dict()) == ["weight"]
    for one in (FocalLoss(), BinaryFocalLoss(), DiceLoss(), QuantileLoss()): assert not one.state_dict()
    assert QuantileLoss().to("meta").quantiles.device.type == "meta"


def test_losses_work_under_autocast():
    model = nn.Linear(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(INPUTS.float())
        assert scores.dtype == torch.bfloat16
        for loss in (FocalLoss(0.5)(scores, CLASSES), BinaryFocalLoss()(scores, LABELS.float()),
                     DiceLoss()(scores[..., None], CLASSES[:, None]), QuantileLoss()(scores, INPUTS[:, 0].float())):
            assert loss.isfinite()
            loss.backward(retain_graph=True)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_torchs_own_mean_with_label_smoothing_is_what_the_loop_counts():
    scores, loss_fn = torch.randn(N, 3, dtype=torch.float64), nn.CrossEntropyLoss(WEIGHT, ignore_index=-1, label_smoothing=0.3)
    output = StepOutput(predictions=scores)
    CountedLoss(loss_fn)(output, Batch(INPUTS, SOME, N))
    sums = F.cross_entropy(scores, SOME, WEIGHT, ignore_index=-1, label_smoothing=0.3, reduction="sum")
    assert output.loss.item() == loss_fn(scores, SOME).item()
    assert (output.loss * output.count).item() == pytest.approx(sums.item(), rel=1e-12)
