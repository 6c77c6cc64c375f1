"""A PyTorch training library written as notebooks

Modules:

- `nbdev_trainer.core.duration`: How long to train, how often to validate: a number and its unit
- `nbdev_trainer.core.errors`: Helpers that make an error message say what happened, what was expected, and what to do
- `nbdev_trainer.core.nested`: Work on every tensor of a batch, whatever containers it comes in
- `nbdev_trainer.core.seeding`: Same seed, same numbers: global generators that can be kept and put back, and orders that need no generator
- `nbdev_trainer.data.datasets`: A small data set that comes with the library
- `nbdev_trainer.data.readers`: Read a folder in the format of MNIST, or a CSV file of numbers, into tensors
- `nbdev_trainer.data.splits`: Which samples are trained on and which are held out
- `nbdev_trainer.store.files`: Write a file whole or not at all; read it without running anything"""

__version__ = "0.1.0"
