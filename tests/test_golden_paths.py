"""The programs of the design, word for word; each test only defines the names that its program leaves open."""

import os

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer.cli import main

ARRAYS_IN_MEMORY = '''
from torch import nn
from nbdev_trainer import Accuracy, Learner, Loaders, digits
images, labels = digits()                        # embedded: 1,797 8x8 digits, (1797, 1, 8, 8) float32 in [0,1], int64
loaders = Loaders.from_arrays(images, labels, valid=0.2, batch_size=64, seed=0)
model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
learner = Learner(model, loaders, loss_fn=nn.CrossEntropyLoss(), metrics=[Accuracy()])
learner.fit_one_cycle(5, lr=1e-2)
learner.history                                  # a table: one row per epoch; learner.history["valid_loss"] is a list
learner.validate()                               # {"loss": ..., "accuracy": ...}; or validate(loader)
learner.predict(loaders.valid).predictions       # in dataset order, with .targets and .ids
learner.save("model.safetensors"); learner.load("model.safetensors")
'''

OWN_LOADERS = '''
learner = Learner(model, (train_loader, valid_loader), loss_fn=loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), metrics=[torchmetrics.F1Score("multiclass", num_classes=10)])
learner.fit(3)
'''

OWN_STEP = '''
class GAN(ManualStep):
    def train(self, trainer, batch):
        fake = trainer.model["generator"](torch.randn(batch.size, 64, device=trainer.device))
        trainer.optimize(critic_loss(trainer.model["critic"], batch.inputs, fake.detach()), "critic")
        trainer.optimize(-trainer.model["critic"](fake).mean(), "generator")
        return StepOutput()
Learner(nn.ModuleDict({"generator": g, "critic": c}), (train_loader, None), step=GAN(), optimizer={"generator": opt_g, "critic": opt_c}).fit("10000ba")
'''

OWN_LOOP = '''
trainer = Trainer(model, SupervisedStep(loss_fn), optimizer, callbacks=[...]); trainer.fit(train_loader, valid_loader, n=3)
'''


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def digit_loaders():
    from nbdev_trainer import digits

    images, labels = digits()
    train, valid = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(valid, batch_size=100)


def digit_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_arrays_in_memory():
    names = {}
    exec(ARRAYS_IN_MEMORY, names)
    learner, loaders = names["learner"], names["loaders"]
    assert learner.history["epoch"] == [1, 2, 3, 4, 5] and len(learner.history["valid_loss"]) == 5
    assert learner.validate()["accuracy"] > 0.95 and learner.validate().keys() == {"loss", "accuracy"}
    predicted = learner.predict(loaders.valid)
    assert torch.equal(predicted.ids, loaders.valid.rows.sort().values)
    assert torch.equal(predicted.targets, names["labels"][predicted.ids])
    assert os.path.getsize("model.safetensors") > 80_000


def test_own_loaders_optimizer_and_torchmetrics(capsys):
    import torchmetrics

    from nbdev_trainer import Learner

    train_loader, valid_loader = digit_loaders()
    names = dict(Learner=Learner, model=digit_model(), torch=torch, torchmetrics=torchmetrics)
    names |= dict(train_loader=train_loader, valid_loader=valid_loader, loss_fn=nn.CrossEntropyLoss())
    exec(OWN_LOADERS, names)
    history = names["learner"].history
    f1 = next(name for name in history.columns if name.startswith("valid_") and name != "valid_loss")
    assert history["epoch"] == [1, 2, 3] and 0.5 < history[f1][2] <= 1
    assert len(capsys.readouterr().out.splitlines()) == 5  # the device, a header, three rows


def test_a_step_of_ones_own_with_several_optimizers(capsys):
    import nbdev_trainer
    from nbdev_trainer import Learner, ManualStep, StepOutput

    def critic_loss(critic, real, fake):
        return critic(fake).mean() - critic(real).mean()

    class Timeless(Learner):
        """The program says 10000 batches; the test has a second."""

        def fit(self, n):
            assert n == "10000ba"
            fitted.append(self)
            super().fit("300ba")

    fitted, g, c = [], nn.Linear(64, 2), nn.Linear(2, 1)
    names = vars(nbdev_trainer) | dict(Learner=Timeless, ManualStep=ManualStep, StepOutput=StepOutput, torch=torch)
    names |= dict(nn=nn, g=g, c=c, critic_loss=critic_loss)
    names |= dict(opt_g=torch.optim.Adam(g.parameters()), opt_c=torch.optim.Adam(c.parameters()))
    names["train_loader"] = DataLoader(TensorDataset(torch.randn(160, 2), torch.zeros(160)), batch_size=16)
    before = [parameter.clone() for parameter in (*g.parameters(), *c.parameters())]
    exec(OWN_STEP, names)
    history = fitted[0].history
    assert history["batch"] == list(range(10, 301, 10)) and "train_loss" not in history.columns
    assert "nan" not in capsys.readouterr().out.lower()
    changed = [torch.equal(a, b) for a, b in zip(before, (*g.parameters(), *c.parameters()))]
    assert changed == [False, False, False, True]  # a critic's bias cancels out in the difference of its means


def test_the_loop_alone():
    from nbdev_trainer import Recorder, SupervisedStep, Trainer

    (train_loader, valid_loader), model = digit_loaders(), digit_model()
    names = dict(Trainer=Trainer, SupervisedStep=SupervisedStep, model=model, loss_fn=nn.CrossEntropyLoss())
    names |= dict(train_loader=train_loader, valid_loader=valid_loader, recorder=Recorder())
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(OWN_LOOP.replace("[...]", "[recorder]"), names)
    assert names["recorder"].history["epoch"] == [1, 2, 3]
    assert names["recorder"].history["valid_loss"][2] < names["recorder"].history["valid_loss"][0]


PIPELINE = """
data = Data(
    items=image_files("flowers/"),
    fields={"image": Image(), "label": Category(parent_name)},   # kind(reader): how to get the raw value out of an item
    inputs="image", targets="label",
    split=random_split(valid=0.2, seed=0),
    transforms=[Resize(160)],                     # every item
    train_transforms=[RandomCrop(128), Flip()],   # training items; random
    batch_transforms=[Normalize.imagenet()],      # whole batches, on the device
)
loaders = data.loaders(batch_size=64, num_workers=2)
data.check()            # one item and one batch through every stage: type, shape, range, time of each
loaders.show_batch()
"""


def draw_flowers(folder):
    """Sixty pictures of two kinds of flowers, of different heights."""
    draw = np.random.default_rng(0)
    for number in range(60):
        pixels = draw.integers(0, 120, (180 + number, 200, 3), np.uint8)
        pixels[60:120, 70:130, number % 2] = 250
        place = folder / "flowers" / ("poppy", "clover")[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(place)


def test_the_data_pipeline(tmp_path, monkeypatch):
    draw_flowers(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(f"from nbdev_trainer.data import *\n{PIPELINE}", names)
    assert names["data"].check().ok
    batch = next(iter(names["loaders"].train))
    assert batch.inputs.shape == (48, 3, 128, 128) and batch.inputs.dtype == torch.float32
    assert next(iter(names["loaders"].valid)).inputs.shape == (12, 3, 160, 160)
    assert len(names["loaders"].show_batch().axes) == 9


def test_photos_on_the_command_line(tmp_path, monkeypatch, capsys):
    draw_flowers(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "flowers/"]) == 0
    assert main(["fit", "flowers/", "--epochs", "5", "--size", "32", "--out", "run", "--device", "cpu"]) == 0
    assert main(["predict", "run", "flowers/poppy"]) == 0
    assert "nothing odd was found" in (said := capsys.readouterr().out)
    assert "few pictures: --model timm:resnet18" in said and said.splitlines()[-1].startswith("8.jpg,")


LARGE_BATCHES = """
learner = Learner(model, loaders, loss_fn=loss_fn, precision="bf16", accumulate=4, clip_norm=1.0, callbacks=[EMA(0.999), EarlyStopping("valid_loss", patience=3, restore_best=True)])
"""

TRANSFER = """
learner.freeze(except_last=1); learner.fit(1, lr=1e-3); learner.unfreeze(); learner.fit_one_cycle(3, lr=(1e-5, 1e-3))
learner.fine_tune(3, lr=1e-3)                    # the line above in one
"""


def small_learner(program, **names):
    import nbdev_trainer

    images, labels = nbdev_trainer.digits()
    loaders = nbdev_trainer.Loaders.from_arrays(images[:600], labels[:600], valid=0.2, batch_size=64, seed=0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    names |= vars(nbdev_trainer) | dict(model=model, loaders=loaders, loss_fn=nn.CrossEntropyLoss())
    exec(program, names)
    return names["learner"]


def test_large_batches_averages_and_the_best_weights():
    learner = small_learner(LARGE_BATCHES)
    learner.fit_one_cycle(4, lr=1e-2)
    assert learner.validate()["loss"] == pytest.approx(min(learner.history["valid_loss"]), rel=1e-6)


def test_transfer_learning():
    from nbdev_trainer import Learner

    learner = small_learner("learner = Learner(model, loaders, loss_fn=loss_fn)")
    before = learner.model[0].weight.detach().clone()
    exec(TRANSFER.splitlines()[1], dict(learner=learner))
    assert not torch.equal(before, learner.model[0].weight) and learner.history["epoch"] == [1, 2, 3, 4]
    exec(TRANSFER.splitlines()[2], dict(learner=learner))
    assert learner.history["epoch"][-1] == 8 and isinstance(learner, Learner)
