"""The digits in fastai: accuracy, validation, a schedule, saved weights."""

from fastai.basics import *
from fastai.callback.all import *
from torch.utils.data import TensorDataset, random_split

from nbdev_trainer import digits

set_seed(0)
train, valid = random_split(TensorDataset(*digits()), [0.8, 0.2])
dls = DataLoaders.from_dsets(train, valid, bs=64, device=default_device())
model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))

learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
learn.fit_one_cycle(5, 1e-2)
learn.save("digits")

loss, valid_accuracy = learn.validate()
print(f"validation accuracy: {valid_accuracy:.4f}")
