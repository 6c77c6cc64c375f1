"""The digits in Ignite: accuracy, validation, a schedule, saved weights."""

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import LRScheduler
from ignite.handlers.tqdm_logger import ProgressBar
from ignite.metrics import Accuracy, Loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from nbdev_trainer import digits

torch.manual_seed(0)
train, valid = random_split(TensorDataset(*digits()), [0.8, 0.2])
train_loader = DataLoader(train, batch_size=64, shuffle=True)
valid_loader = DataLoader(valid, batch_size=64)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10)).to(device)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5 * len(train_loader))

trainer = create_supervised_trainer(
    model, optimizer, loss_fn, device=device, output_transform=lambda x, y, y_pred, loss: (y_pred, y))
evaluator = create_supervised_evaluator(
    model, metrics={"loss": Loss(loss_fn), "accuracy": Accuracy()}, device=device)
Loss(loss_fn).attach(trainer, "loss")
Accuracy().attach(trainer, "accuracy")
ProgressBar().attach(trainer)
trainer.add_event_handler(Events.ITERATION_STARTED, LRScheduler(schedule))


@trainer.on(Events.EPOCH_COMPLETED)
def validate(engine):
    evaluator.run(valid_loader)
    print(engine.state.epoch, engine.state.metrics, evaluator.state.metrics)


trainer.run(train_loader, max_epochs=5)
torch.save(model.state_dict(), "digits.pt")

print(f"validation accuracy: {evaluator.state.metrics['accuracy']:.4f}")
