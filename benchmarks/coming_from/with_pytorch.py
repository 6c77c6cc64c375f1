"""The digits in plain PyTorch: accuracy, validation, a schedule, saved weights."""

import torch
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
n_epochs = 5
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=n_epochs * len(train_loader))

for epoch in range(n_epochs):
    model.train()
    train_loss, right, n = 0.0, 0, 0
    for inputs, targets in train_loader:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        predictions = model(inputs)
        loss = loss_fn(predictions, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        train_loss += loss.item() * len(targets)
        right += (predictions.argmax(1) == targets).sum().item()
        n += len(targets)
    train_loss, train_accuracy = train_loss / n, right / n

    model.eval()
    valid_loss, right, n = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in valid_loader:
            inputs, targets = inputs.to(device), targets.to(device)
            predictions = model(inputs)
            valid_loss += loss_fn(predictions, targets).item() * len(targets)
            right += (predictions.argmax(1) == targets).sum().item()
            n += len(targets)
    valid_loss, valid_accuracy = valid_loss / n, right / n
    print(f"{epoch + 1} {train_loss:.4f} {train_accuracy:.4f} {valid_loss:.4f} {valid_accuracy:.4f}")

torch.save(model.state_dict(), "digits.pt")
print(f"validation accuracy: {valid_accuracy:.4f}")
