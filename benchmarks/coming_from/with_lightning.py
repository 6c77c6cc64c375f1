"""The digits in Lightning: accuracy, validation, a schedule, saved weights."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from nbdev_trainer import digits


class Classifier(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
        self.loss_fn = nn.CrossEntropyLoss()
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        self.valid_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        predictions = self.model(inputs)
        loss = self.loss_fn(predictions, targets)
        self.train_accuracy(predictions, targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        predictions = self.model(inputs)
        self.valid_accuracy(predictions, targets)
        self.log("valid_loss", self.loss_fn(predictions, targets), prog_bar=True)
        self.log("valid_accuracy", self.valid_accuracy, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


L.seed_everything(0)
train, valid = random_split(TensorDataset(*digits()), [0.8, 0.2])
train_loader = DataLoader(train, batch_size=64, shuffle=True)
valid_loader = DataLoader(valid, batch_size=64)

module = Classifier(lr=1e-2)
trainer = L.Trainer(max_epochs=5, logger=False, enable_checkpointing=False)
trainer.fit(module, train_loader, valid_loader)
trainer.save_checkpoint("digits.ckpt", weights_only=True)

print(f"validation accuracy: {trainer.callback_metrics['valid_accuracy']:.4f}")
