"""Mistakes planted into sound set-ups, which `check` must name, and sound set-ups, in which it must find nothing."""

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from helpers import arrays, conv_net, differences, foreign_loader, one_thread, own_loader  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer.apps.models import make_model
from nbdev_trainer.callbacks.loggers import CSVTable, JSONLines
from nbdev_trainer.callbacks.recorder import Recorder
from nbdev_trainer.callbacks.stopping import EarlyStopping
from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.data.datasets import digits
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.loop.steps import ManualStep, Step, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.use.check import check
from nbdev_trainer.use.rehearsal import dry_run, overfit
from nbdev_trainer.use.summary import summarize

IMAGES, LABELS = digits()
GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(600, 8, generator=GENERATOR)
AMOUNTS = (TABLE @ torch.randn(8, 1, generator=GENERATOR)) + 0.1 * torch.randn(600, 1, generator=GENERATOR)
CLASSES = (TABLE @ torch.randn(8, 3, generator=GENERATOR)).argmax(1)
SHUFFLED = torch.randperm(600, generator=GENERATOR)


def trainer_of(model, loss_fn, optimizer=None, lr=1e-3, step=None, **options):
    params = [p for p in model.parameters() if p.requires_grad]
    return Trainer(
        model, step or SupervisedStep(loss_fn), optimizer or torch.optim.Adam(params, lr=lr, **options)
    )


def data(inputs, targets, valid=0.2, **options):
    return Loaders.from_arrays(inputs, targets, **{"valid": valid, "batch_size": 64, "seed": 0} | options)


def perceptron(n_inputs=8, n_outputs=3, *last):
    torch.manual_seed(0)
    layers = nn.Linear(n_inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_outputs)
    return nn.Sequential(nn.Flatten(), *layers, *last)


def digits_cnn(channels=1):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(256, 10))


class Between(nn.Module):
    """A function as a layer."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, hidden):
        return self.fn(hidden)


def classifier(*last, loss_fn=None, targets=CLASSES, inputs=TABLE, n_outputs=3, lr=1e-3, **options):
    """A perceptron on the table."""
    trainer = trainer_of(perceptron(8, n_outputs, *last), loss_fn or nn.CrossEntropyLoss(), lr=lr)
    return trainer, data(inputs, targets, **options)


def regressor(*last, loss_fn=None, targets=AMOUNTS, inputs=TABLE, **options):
    trainer = trainer_of(perceptron(8, 1, *last), loss_fn or nn.MSELoss(), **options)
    return trainer, data(inputs, targets)


def changed(change, model=None, loss_fn=None, inputs=TABLE, targets=CLASSES, **options):
    """A model that was changed before its optimizer was made."""
    model = model or perceptron()
    change(model)
    return trainer_of(model, loss_fn or nn.CrossEntropyLoss(), **options), data(inputs, targets)


PLANTED = {}


def planted(name, finding=None):
    """Register a function that makes (trainer, loaders) with a mistake, and the finding that must name it."""

    def register(make):
        PLANTED[name] = make, finding or name
        return make

    return register


def plant(name, finding, make):
    PLANTED[name] = make, finding


# the end of the model
plant("softmax before cross-entropy", "softmax_before_cross_entropy", lambda: classifier(nn.Softmax(1)))
plant("sigmoid before cross-entropy", "sigmoid_before_cross_entropy", lambda: classifier(nn.Sigmoid()))
plant("log-softmax before cross-entropy", "log_softmax_twice", lambda: classifier(nn.LogSoftmax(1)))
plant("softmax over the batch", "softmax_over_batch", lambda: classifier(nn.Softmax(0)))
plant("ReLU on the scores", "activation_on_scores", lambda: classifier(nn.ReLU()))
plant("NLLLoss on scores", "nll_without_log_softmax", lambda: classifier(loss_fn=nn.NLLLoss()))
plant("ReLU on a regression", "outputs_cannot_reach_targets", lambda: regressor(nn.ReLU()))
plant("sigmoid on a regression", "outputs_cannot_reach_targets", lambda: regressor(nn.Sigmoid()))
plant(
    "softmax in a loss of one's own",
    "softmax_before_cross_entropy",
    lambda: classifier(nn.Softmax(1), loss_fn=lambda p, t: F.cross_entropy(p, t)),
)
BINARY = (AMOUNTS > 0).float()
plant("BCELoss on scores", "bce_on_logits", lambda: regressor(loss_fn=nn.BCELoss(), targets=BINARY))
plant(
    "sigmoid before BCEWithLogits",
    "sigmoid_before_bce_with_logits",
    lambda: regressor(nn.Sigmoid(), loss_fn=nn.BCEWithLogitsLoss(), targets=BINARY),
)

# targets and loss
plant(
    "integer targets of a binary loss",
    "integer_targets",
    lambda: regressor(loss_fn=nn.BCEWithLogitsLoss(), targets=BINARY.long()),
)
plant("squared error of classes", "regression_loss_for_classes", lambda: classifier(loss_fn=nn.MSELoss()))
plant("floating-point class numbers", "float_class_targets", lambda: classifier(targets=CLASSES.float()))
plant("one-hot whole numbers", "one_hot_targets", lambda: classifier(targets=F.one_hot(CLASSES)))
plant(
    "several labels under cross-entropy",
    "cross_entropy_for_several_labels",
    lambda: classifier(targets=(TABLE[:, :3] > 0).float()),
)
plant("targets start at 1", "targets_start_at_1", lambda: classifier(targets=CLASSES + 1))
plant(
    "targets start at 1, with a spare output",
    "targets_start_at_1",
    lambda: classifier(targets=CLASSES + 1, n_outputs=4),
)
plant("too few outputs", "targets_out_of_range", lambda: classifier(n_outputs=2))
plant("too many outputs", "more_outputs_than_classes", lambda: classifier(n_outputs=20))
plant(
    "binary targets of -1 and 1",
    "targets_out_of_range",
    lambda: regressor(loss_fn=nn.BCEWithLogitsLoss(), targets=BINARY * 2 - 1),
)
plant("shapes that broadcast", "shapes_broadcast", lambda: regressor(targets=AMOUNTS[:, 0]))
plant(
    "shapes that broadcast in a loss of one's own",
    "shapes_broadcast",
    lambda: regressor(loss_fn=lambda p, t: (p - t).square().mean(), targets=AMOUNTS[:, 0]),
)
plant(
    "a loss that sums", "loss_sums_over_batch", lambda: regressor(loss_fn=lambda p, t: (p - t).square().sum())
)
plant(
    "a loss without the targets",
    "loss_ignores_targets",
    lambda: regressor(loss_fn=lambda p, t: (p - p.detach() + p).square().mean()),
)
plant("a loss per sample", "loss_not_scalar", lambda: regressor(loss_fn=lambda p, t: (p - t).square()[:, 0]))
plant(
    "a loss that is NaN",
    "loss_not_finite",
    lambda: regressor(loss_fn=lambda p, t: (p - t).abs().neg().log().mean()),
)
plant("targets in thousands", "targets_not_scaled", lambda: regressor(targets=AMOUNTS * 1000 + 9000))


@planted("classes in the last axis", "classes_in_last_axis")
def _():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5))
    words = torch.randint(20, (200, 7), generator=torch.Generator().manual_seed(0))
    return trainer_of(model, nn.CrossEntropyLoss()), data(words, words % 5)


@planted("as many words as classes, and classes in the last axis", "classes_in_last_axis")
def _():
    words = torch.randint(20, (200, 7), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 7))
    return trainer_of(model, nn.CrossEntropyLoss()), data(words, words % 7)


# data
plant(
    "labels shuffled against inputs",
    "targets_unrelated_to_inputs",
    lambda: classifier(targets=CLASSES[SHUFFLED]),
)
plant(
    "amounts shuffled against inputs",
    "targets_unrelated_to_inputs",
    lambda: regressor(targets=AMOUNTS[SHUFFLED]),
)
plant(
    "digits with the labels of others",
    "targets_unrelated_to_inputs",
    lambda: (
        trainer_of(digits_cnn(), nn.CrossEntropyLoss()),
        data(IMAGES, LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))]),
    ),
)
plant("one class only", "one_class", lambda: classifier(targets=CLASSES * 0 + 1))
plant("one amount only", "constant_targets", lambda: regressor(targets=AMOUNTS * 0 + 1))
plant("the same sample each time", "identical_inputs", lambda: classifier(inputs=TABLE[:1].expand(600, 8)))
plant(
    "NaN in the inputs",
    "inputs_not_finite",
    lambda: classifier(inputs=torch.where(TABLE > 2.5, torch.nan, TABLE)),
)
plant(
    "infinite targets",
    "targets_not_finite",
    lambda: regressor(targets=torch.where(AMOUNTS > 4, torch.inf, AMOUNTS)),
)
plant(
    "pixels up to 255",
    "inputs_not_scaled",
    lambda: (trainer_of(digits_cnn(), nn.CrossEntropyLoss()), data(IMAGES * 255, LABELS)),
)
plant(
    "divided by 255 twice",
    "inputs_not_scaled",
    lambda: (trainer_of(digits_cnn(), nn.CrossEntropyLoss()), data(IMAGES / 255 / 255, LABELS)),
)
plant(
    "features of different sizes",
    "features_differ_in_scale",
    lambda: classifier(inputs=TABLE * torch.tensor([1.0, 1e4, 1.0, 1e-3, 1.0, 1.0, 1.0, 1.0])),
)
plant(
    "bytes for a float model",
    "wrong_input_dtype",
    lambda: (trainer_of(digits_cnn(), nn.CrossEntropyLoss()), data((IMAGES * 255).byte(), LABELS)),
)
plant("doubles for a float model", "wrong_input_dtype", lambda: classifier(inputs=TABLE.double()))
plant(
    "colours last",
    "channels_last",
    lambda: (
        trainer_of(digits_cnn(3), nn.CrossEntropyLoss()),
        data(IMAGES[:, 0, :, :, None].repeat(1, 1, 1, 3), LABELS),
    ),
)
plant(
    "one class in a hundred samples is another",
    "class_imbalance",
    lambda: classifier(targets=(TABLE[:, 0] > 2.3).long(), n_outputs=2),
)
plant(
    "sorted by class and not shuffled",
    "sorted_labels",
    lambda: classifier(
        inputs=TABLE[CLASSES.argsort()], targets=CLASSES.sort().values, shuffle=False, valid=None
    ),
)


@planted("a list of batches, class after class", "sorted_labels")
def _():
    order = CLASSES.argsort()
    batches = list(zip(TABLE[order].split(50), CLASSES[order].split(50), strict=True))
    return trainer_of(perceptron(), nn.CrossEntropyLoss()), Loaders(batches)


@planted("validation on the training data", "validation_overlaps_training")
def _():
    batches = list(zip(TABLE.split(50), CLASSES.split(50), strict=True))
    return trainer_of(perceptron(), nn.CrossEntropyLoss()), Loaders(batches, batches)


plant(
    "some training samples in the validation data",
    "validation_overlaps_training",
    lambda: classifier(valid=(torch.cat([TABLE[:30], torch.randn(70, 8)]), CLASSES[:100])),
)
plant(
    "validation data scaled otherwise",
    "validation_differs",
    lambda: classifier(valid=(TABLE[:99] * 99, CLASSES[:99])),
)
plant(
    "validation without a batch",
    "no_validation_data",
    lambda: (classifier()[0], Loaders(data(TABLE, CLASSES).train, [])),
)
plant(
    "a last batch of one",
    "batch_norm_batch_size",
    lambda: (trainer_of(conv_net(), nn.CrossEntropyLoss()), Loaders(own_loader(33))),
)
plant(
    "batches of one",
    "batch_norm_batch_size",
    lambda: (trainer_of(conv_net(), nn.CrossEntropyLoss()), Loaders(own_loader(33, batch_size=1))),
)

# model
plant("a detached head", "detached", lambda: changed(lambda m: m.insert(3, Between(torch.detach))))
plant(
    "a loss through argmax",
    "detached",
    lambda: regressor(loss_fn=lambda p, t: (p.argmax(1).float() - t[:, 0]).abs().mean()),
)
plant(
    "a layer that is never called",
    "unused_parameters",
    lambda: changed(lambda m: m[1].add_module("spare", nn.Linear(3, 3))),
)
plant(
    "the head frozen by accident", "frozen_by_accident", lambda: changed(lambda m: m[5].requires_grad_(False))
)
plant(
    "a middle layer frozen by accident",
    "frozen_by_accident",
    lambda: changed(lambda m: m[3].requires_grad_(False)),
)
plant(
    "dead ReLU initialisation", "dead_units", lambda: changed(lambda m: nn.init.constant_(m[1].bias, -100.0))
)
plant(
    "weights of zero", "equal_units", lambda: changed(lambda m: [nn.init.zeros_(p) for p in m.parameters()])
)
plant(
    "constant weights",
    "equal_units",
    lambda: changed(lambda m: [nn.init.constant_(p, 0.1) for p in m.parameters()]),
)
plant(
    "exploding weights",
    "exploding_activations",
    lambda: changed(lambda m: [nn.init.normal_(p, std=8.0) for p in m.parameters()]),
)
plant(
    "dropout of everything", "dropout_of_everything", lambda: changed(lambda m: m.insert(3, nn.Dropout(1.0)))
)
plant(
    "inputs that are not used",
    "outputs_ignore_inputs",
    lambda: changed(lambda m: m.insert(1, Between(lambda x: x * 0 + 1))),
)
plant(
    "a view that mixes samples",
    "samples_influence_each_other",
    lambda: changed(lambda m: m.insert(3, Between(lambda x: x.t().reshape(x.shape)))),
)
plant(
    "a mean over the batch",
    "samples_influence_each_other",
    lambda: changed(lambda m: m.insert(3, Between(lambda x: x - 2 * x.mean(0)))),
)
plant(
    "a view that changes the batch size",
    "batch_size_changed",
    lambda: changed(lambda m: m.append(Between(lambda x: x.view(-1, 6))).append(nn.Linear(6, 3))),
)
plant(
    "a gradient that is NaN",
    "gradient_not_finite",
    lambda: changed(lambda m: m.insert(3, Between(lambda x: x + (x - x).sqrt()))),
)


@planted("vanishing gradients", "vanishing_gradients")
def _():
    torch.manual_seed(0)
    deep = [part for _ in range(10) for part in (nn.Linear(16, 16), nn.Sigmoid())]
    return trainer_of(nn.Sequential(nn.Linear(8, 16), *deep, nn.Linear(16, 3)), nn.CrossEntropyLoss()), data(
        TABLE, CLASSES
    )


# optimizer
plant("a learning rate much too high", "lr_too_high", lambda: classifier(lr=30.0))
plant("a learning rate much too low", "lr_too_low", lambda: classifier(lr=1e-10))
plant("a learning rate of zero", "lr_not_positive", lambda: classifier(lr=0.0))
plant("absurd weight decay", "weight_decay_absurd", lambda: changed(lambda m: None, weight_decay=10.0))
plant("an optimizer that climbs", "loss_does_not_fall", lambda: changed(lambda m: None, maximize=True))
plant(
    "a loss with the wrong sign",
    "loss_does_not_fall",
    lambda: regressor(loss_fn=lambda p, t: torch.exp(-(p - t).square()).mean(), maximize=True),
)


@planted("parameters missing in the optimizer", "not_in_optimizer")
def _():
    model = perceptron()
    return trainer_of(model, nn.CrossEntropyLoss(), torch.optim.Adam(model[1].parameters())), data(
        TABLE, CLASSES
    )


@planted("an optimizer with the old head", "optimizer_has_other_parameters")
def _():
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    model[5] = nn.Linear(32, 3)
    return trainer_of(model, nn.CrossEntropyLoss(), optimizer), data(TABLE, CLASSES)


plant(
    "a loss that is a Python number",
    "loss_fails",
    lambda: classifier(loss_fn=lambda p, t: F.cross_entropy(p, t).item()),
)
plant("another number of features", "forward_fails", lambda: classifier(inputs=TABLE[:, :7]))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name):
    make, finding = PLANTED[name]
    trainer, loaders = make()
    report = check(trainer, loaders.train, loaders.valid_sets)
    assert finding in report.names, str(report)
    assert len(report.findings) <= 3, str(report)  # a mistake is not buried under its consequences
    assert all(one.what and one.mend for one in report.findings)
    assert not any("could not be done" in note for note in report.notes), report.notes


def test_there_are_many_planted_mistakes():
    assert len(PLANTED) >= 60
    assert len({finding for _, finding in PLANTED.values()}) >= 35


# ten and more sound set-ups

SOUND = {}


def sound(make):
    SOUND[make.__name__] = make
    return make


@sound
def digits_by_a_cnn():
    return trainer_of(digits_cnn(), nn.CrossEntropyLoss()), data(IMAGES, LABELS)


@sound
def digits_with_standardizing_layers_and_raw_pixels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), *digits_cnn())
    return trainer_of(model, nn.CrossEntropyLoss()), data(IMAGES * 255, LABELS)


@sound
def a_perceptron_on_a_table():
    return classifier()


@sound
def a_perceptron_by_sgd():
    model = perceptron()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return trainer_of(model, nn.CrossEntropyLoss(), sgd), data(TABLE, CLASSES)


@sound
def regression():
    return regressor()


@sound
def regression_of_prices_through_a_relu():
    return regressor(nn.Softplus(), targets=AMOUNTS.abs())


@sound
def two_classes_with_logits():
    return regressor(loss_fn=nn.BCEWithLogitsLoss(), targets=BINARY)


@sound
def two_classes_with_probabilities():
    return regressor(nn.Sigmoid(), loss_fn=nn.BCELoss(), targets=BINARY)


@sound
def log_softmax_and_nll():
    return classifier(nn.LogSoftmax(1), loss_fn=nn.NLLLoss())


@sound
def several_labels():
    return classifier(loss_fn=nn.BCEWithLogitsLoss(), targets=(TABLE[:, :3] > 0).float())


@sound
def label_smoothing_with_probabilities():
    return classifier(targets=F.one_hot(CLASSES).float() * 0.9 + 0.1 / 3)


@sound
def class_weights():
    return classifier(loss_fn=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), label_smoothing=0.1))


@sound
def tokens_with_ignored_ones():
    torch.manual_seed(0)
    words = torch.randint(1, 20, (300, 7))
    targets = torch.where(torch.rand(300, 7) < 0.3, -100, words % 5)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 5)

        def forward(self, words):
            return self.head(self.embedding(words)).movedim(-1, 1)

    return trainer_of(Tagger(), nn.CrossEntropyLoss(), lr=1e-2), data(words, targets)


@sound
def batch_norm_and_dropout():
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5)
    return trainer_of(nn.Sequential(*layers, nn.Linear(32, 3)), nn.CrossEntropyLoss(), lr=1e-2), data(
        TABLE, CLASSES
    )


@sound
def a_frozen_backbone():
    model = perceptron()
    for layer in model[:5]:
        layer.requires_grad_(False)
    return trainer_of(model, nn.CrossEntropyLoss()), data(TABLE, CLASSES)


@sound
def a_head_that_begins_at_zero():
    model = perceptron()
    nn.init.zeros_(model[5].weight), nn.init.zeros_(model[5].bias)
    return trainer_of(model, nn.CrossEntropyLoss()), data(TABLE, CLASSES)


@sound
def a_recurrent_network():
    torch.manual_seed(0)
    series = torch.randn(400, 12, 3).cumsum(1) / 3

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, series):
            return self.head(self.rnn(series)[0][:, -1])

    return trainer_of(Last(), nn.MSELoss(), lr=1e-2), data(series, series[:, -1, :1] + series[:, -2, 1:2])


@sound
def a_transformer():
    torch.manual_seed(0)
    words = torch.randint(20, (300, 6))
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layers = nn.Embedding(20, 16), encoder, Between(lambda hidden: hidden.mean(1)), nn.Linear(16, 4)
    return trainer_of(nn.Sequential(*layers), nn.CrossEntropyLoss()), data(words, words[:, 0] % 4)


@sound
def an_autoencoder():
    torch.manual_seed(0)
    layers = (
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 64),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 8, 8)),
    )
    return trainer_of(nn.Sequential(*layers), nn.MSELoss()), data(IMAGES, IMAGES)


@sound
def nine_in_ten_of_one_class():
    return classifier(targets=(TABLE[:, 0] > 1.28).long(), n_outputs=2)


@sound
def segmentation():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    return trainer_of(nn.Sequential(*layers), nn.CrossEntropyLoss()), data(
        IMAGES, (IMAGES[:, 0] > 0.5).long()
    )


@sound
def a_loss_that_squeezes():
    return regressor(loss_fn=lambda p, t: F.mse_loss(p.squeeze(1), t), targets=AMOUNTS[:, 0])


@sound
def a_loss_that_takes_the_logarithm():
    return classifier(nn.Softmax(1), loss_fn=lambda p, t: F.nll_loss(p.log(), t))


@sound
def a_loss_that_flattens():
    torch.manual_seed(0)
    words = torch.randint(20, (200, 7))
    layers = nn.Embedding(20, 16), nn.Linear(16, 20)

    def flattened(predictions, targets):
        return F.cross_entropy(predictions.flatten(0, 1), targets.flatten())

    return trainer_of(nn.Sequential(*layers), flattened, lr=1e-2), data(words, words.flip(1))


@sound
def a_rate_that_is_high_and_works():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    return trainer_of(nn.Sequential(*layers), nn.CrossEntropyLoss(), lr=0.05), data(IMAGES, LABELS)


@sound
def half_precision():
    return trainer_of(perceptron(64, 10).bfloat16(), nn.CrossEntropyLoss()), data(IMAGES.bfloat16(), LABELS)


@sound
def a_model_that_is_trained_already():
    trainer, loaders = classifier(lr=1e-2)
    trainer.fit(loaders.train, n=10)
    return trainer, loaders


@sound
def a_foreign_loader():
    trainer = trainer_of(perceptron(), nn.CrossEntropyLoss())
    train = DataLoader(TensorDataset(TABLE[:500], CLASSES[:500]), batch_size=50, shuffle=True)
    return trainer, Loaders(train, DataLoader(TensorDataset(TABLE[500:], CLASSES[500:]), batch_size=50))


@sound
def a_few_samples():
    return trainer_of(perceptron(), nn.CrossEntropyLoss()), data(TABLE[:20], CLASSES[:20], batch_size=8)


@sound
def accumulation_and_clipping():
    model = perceptron()
    adam = torch.optim.Adam(model.parameters())
    step = SupervisedStep(nn.CrossEntropyLoss())
    return Trainer(model, step, adam, accumulate=4, clip_norm=1.0), data(TABLE, CLASSES)


@sound
def a_gan():
    class GAN(ManualStep):
        def train(self, trainer, batch):
            critic, fake = trainer.model["critic"], trainer.model["generator"](torch.randn(batch.size, 4))
            trainer.optimize(
                F.softplus(-critic(batch.inputs)).mean() + F.softplus(critic(fake.detach())).mean(), "critic"
            )
            trainer.optimize(F.softplus(-critic(fake)).mean(), "generator")
            return StepOutput()

    torch.manual_seed(0)
    parts = {
        "generator": nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)),
        "critic": perceptron(8, 1),
    }
    optimizers = {name: torch.optim.Adam(part.parameters()) for name, part in parts.items()}
    return Trainer(nn.ModuleDict(parts), GAN(), optimizers), Loaders(data(TABLE, torch.zeros(600)).train)


@sound
def a_language_model_with_a_table_of_positions():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(50, 32), nn.Parameter(0.02 * torch.randn(512, 32))
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.head = nn.Linear(32, 50)
            self.head.weight = self.tokens.weight

        def forward(self, words):
            return self.head(self.block(self.tokens(words) + self.positions[: words.shape[1]])).movedim(-1, 1)

    words = torch.randint(50, (256, 16))
    return trainer_of(Model(), nn.CrossEntropyLoss()), data(words, (words + 1) % 50)


@sound
def a_bag_of_many_words():
    torch.manual_seed(0)
    words = torch.randint(20000, (256, 12))
    model = nn.Sequential(nn.EmbeddingBag(20000, 32), nn.Linear(32, 3))
    return trainer_of(model, nn.CrossEntropyLoss()), data(words, words[:, 0] % 3)


@sound
def a_tagger_that_ignores_class_0():
    torch.manual_seed(0)
    words = torch.randint(1, 20, (256, 12))
    words[torch.arange(12) >= torch.randint(4, 12, (256, 1))] = 0
    targets = torch.where(words == 0, 0, words % 9 + 1)
    layers = (
        nn.Embedding(20, 32, padding_idx=0),
        nn.Linear(32, 10),
        Between(lambda scores: scores.movedim(-1, 1)),
    )
    return trainer_of(nn.Sequential(*layers), nn.CrossEntropyLoss(ignore_index=0), lr=1e-2), data(
        words, targets
    )


class Adapted(nn.Module):
    """A frozen layer with two small matrices beside it."""

    def __init__(self, n_inputs, n_outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(n_inputs, n_outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(n_inputs, rank, bias=False), nn.Linear(rank, n_outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs):
        return self.base(inputs) + self.up(self.down(inputs))


@sound
def low_rank_adaption_of_each_layer():
    torch.manual_seed(0)
    layers = Adapted(8, 32), nn.ReLU(), Adapted(32, 32), nn.ReLU(), nn.Linear(32, 3)
    return trainer_of(nn.Sequential(*layers), nn.CrossEntropyLoss()), data(TABLE, CLASSES)


@sound
def a_trained_prompt_before_a_frozen_network():
    model = nn.Sequential(nn.Linear(8, 8), perceptron().requires_grad_(False))
    return trainer_of(model, nn.CrossEntropyLoss()), data(TABLE, CLASSES)


PRICES = AMOUNTS * 60_000 + 250_000


@sound
def regression_that_multiplies_at_the_end():
    return regressor(Between(lambda z: z * 60_000 + 250_000), loss_fn=nn.L1Loss(), targets=PRICES)


@pytest.mark.parametrize("targets", [PRICES, PRICES - PRICES.mean()])
def test_a_model_that_scales_its_outputs_may_have_targets_in_thousands(targets):
    torch.manual_seed(0)
    model = make_model("multilayer_perceptron", TABLE, 1, targets)
    loaders = data(TABLE, targets)
    report = check(trainer_of(model, nn.MSELoss()), loaders.train, loaders.valid_sets)
    assert report.ok, str(report)


@dataclass
class Weighted:
    """A loss that cannot be hashed."""

    weight: float = 2.0

    def __call__(self, predictions, targets):
        return self.weight * F.cross_entropy(predictions, targets)


@sound
def a_loss_that_cannot_be_hashed():
    return classifier(loss_fn=Weighted())


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_set_up(name):
    trainer, loaders = SOUND[name]()
    runs = []
    trainer.model.register_forward_hook(lambda *_: runs.append(1))
    report = check(trainer, loaders.train, loaders.valid_sets)
    assert report.ok, str(report)
    assert not any("could not be" in note for note in report.notes), report.notes
    assert len(runs) <= 25  # one to look at, four to compare, and at most sixteen steps


@pytest.mark.parametrize("place", [lambda model: model, nn.Sequential])
def test_a_compiled_model_of_torchscript_can_be_checked(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = place(torch.jit.script(perceptron()))
    loaders = data(TABLE, CLASSES)
    trainer = trainer_of(model, nn.CrossEntropyLoss())
    report = check(trainer, loaders.train, loaders.valid_sets)
    assert report.ok and list(report.stages)[-1] == "memory", str(report)
    assert summarize(trainer, loaders.train).n_samples == 64


def test_a_rare_class_in_shuffled_data_is_a_warning():
    rare = torch.zeros(20_000, 1)
    rare[:2] = 1
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3000.0]))
    loaders = data(torch.randn(20_000, 8, generator=GENERATOR), rare)
    found = check(trainer_of(perceptron(8, 1), loss_fn), loaders.train).findings
    assert [(one.name, one.level) for one in found] == [("one_class", "warning")]


def test_what_cannot_be_told_of_a_set_up_is_a_note():
    class Unspeakable:
        def __repr__(self):
            raise RuntimeError("no words")

    class Own(Step):
        def train(self, trainer, batch):
            return StepOutput(loss=F.cross_entropy(trainer.model(TABLE[:8]), CLASSES[:8]))

    report = check(trainer_of(perceptron(), None, step=Own()), [Batch(Unspeakable(), None, 8)])
    assert report.ok and "the stages could not be told" in report.notes[-1]


def worker_loader():
    return DataLoader(TensorDataset(*arrays(20)), batch_size=8, shuffle=True, num_workers=1)


def without_seconds(value):
    """A nesting without what a clock has said."""
    if isinstance(value, dict):
        return {key: without_seconds(part) for key, part in value.items() if key != "seconds"}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


MAKERS = own_loader, foreign_loader, lambda: foreign_loader(generator=3), worker_loader


@pytest.mark.parametrize("make_loader", MAKERS)
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_after_looks_equals_training_without(make_loader, optimizer, tmp_path):
    def run(looks):
        torch.manual_seed(0)
        model, loader, path = conv_net(), make_loader(), tmp_path / f"{looks}.jsonl"
        trainer = trainer_of(
            model, nn.CrossEntropyLoss(), getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        )
        trainer.callbacks += [Recorder(), JSONLines(path), EarlyStopping("valid_loss", patience=1)]
        for n in ("7ba", 1):
            for _ in range(looks):
                check(trainer, loader, [arrays()])
                overfit(trainer, loader, steps=6)
                dry_run(trainer, loader, [arrays()])
            trainer.fit(loader, [arrays()], n=n)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows == trainer.callbacks[0].history.rows
        return without_seconds({"state": trainer.state_dict(), "rows": rows, "drawn": torch.rand(3)})

    assert differences(run(looks=2), run(looks=0)) == []


def test_a_check_gives_back_gradients_modes_and_frozen_parameters():
    trainer, loaders = a_frozen_backbone()
    model = trainer.model.train()
    model[1].eval()
    model[5].weight.grad = gradient = torch.ones(3, 32)
    check(trainer, loaders.train, loaders.valid)
    assert model[5].weight.grad is gradient and gradient.sum() == 96
    assert (model.training, model[1].training) == (True, False)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


def test_a_check_does_not_change_batches_that_the_model_changes():
    inputs = TABLE[:64].clone()
    trainer = trainer_of(nn.Sequential(nn.ReLU(inplace=True), perceptron()), nn.CrossEntropyLoss())
    check(trainer, [(inputs, CLASSES[:64])])
    assert torch.equal(inputs, TABLE[:64])


@pytest.mark.parametrize(
    "name", ["digits_by_a_cnn", "regression", "batch_norm_and_dropout", "several_labels"]
)
def test_a_sound_model_learns_two_batches_by_heart(name):
    trainer, loaders = SOUND[name]()
    for slot in trainer.engine.slots.values():
        slot.optimizer.param_groups[0]["lr"] = 1e-2
    report = overfit(trainer, loaders.train)
    assert report.ok, str(report)


def test_a_model_that_cannot_learn_two_batches_is_told():
    trainer, loaders = PLANTED["a detached head"][0]()
    assert overfit(*PLANTED["dead ReLU initialisation"][0]()[:1], loaders.train).names == ["cannot_overfit"]
    report = overfit(trainer, loaders.train, steps=20)
    assert report.names == ["cannot_overfit"]
    assert report.title == "overfit 2 batches" and report.stages["data"] == "2 batches, 128 samples"


def test_a_dry_run_trains_several_optimizers():
    trainer, loaders = a_gan()
    before = trainer.state_dict()
    report = dry_run(trainer, loaders.train)
    assert report.ok and differences(trainer.state_dict(), before) == []


def test_a_dry_run_leaves_a_file_that_goes_on_alone(tmp_path):
    path = tmp_path / "rows.csv"
    trainer, loaders = classifier()
    trainer.callbacks += [Recorder(), CSVTable(path)]
    trainer.fit(loaders.train, loaders.valid)
    text, rows = path.read_text(), list(trainer.callbacks[0].history.rows)
    report = dry_run(trainer, loaders.train, loaders.valid)
    assert path.read_text() == text and trainer.callbacks[0].history.rows == rows
    assert "rows.csv" in report.stages["files"] and list(tmp_path.iterdir()) == [path]
    trainer.fit(loaders.train, loaders.valid)
    assert path.read_text().startswith(text) and len(trainer.callbacks[0].history.rows) == 2
