"""A PyTorch training library written as notebooks

Modules:

- `nbdev_trainer.core.duration`: How long to train, how often to validate: a number and its unit
- `nbdev_trainer.core.errors`: Helpers that make an error message say what happened, what was expected, and what to do
- `nbdev_trainer.core.nested`: Work on every tensor of a batch, whatever containers it comes in
- `nbdev_trainer.core.seeding`: Same seed, same numbers: global generators that can be kept and put back, and orders that need no generator
- `nbdev_trainer.data.batch`: What a loader yields and what a step answers: two small dataclasses and the one rule that turns a loader's output into a `Batch`
- `nbdev_trainer.data.datasets`: A small data set that comes with the library
- `nbdev_trainer.data.loaders`: Batches of samples in an order that is a pure function of seed and epoch, and the train, valid and test sets in one place
- `nbdev_trainer.data.readers`: Read a folder in the format of MNIST, or a CSV file of numbers, into tensors
- `nbdev_trainer.data.splits`: Which samples are trained on and which are held out
- `nbdev_trainer.loop.callback`: Code of one's own at the events of the loop: classes with a method per event, checked when they are defined
- `nbdev_trainer.loop.control`: Calling handlers, asking the loop for something, attaching functions: what callbacks and steps do with a trainer
- `nbdev_trainer.loop.engine`: Where and how a step runs: the device, the weight of each gradient, and the order in which gradients become a step
- `nbdev_trainer.loop.evaluation`: Passes over data that change nothing: validation, test and prediction
- `nbdev_trainer.loop.events`: The one list of moments in a run at which a callback can act
- `nbdev_trainer.loop.optimizers`: The default optimizer, AdamW without the overhead, and the state of any optimizer by parameter name
- `nbdev_trainer.loop.plan`: What one call of `fit` was asked to do: how long to train, when to validate, which learning rate at which step
- `nbdev_trainer.loop.schedules`: Learning rates over a fit, as pure functions of progress
- `nbdev_trainer.loop.snapshot`: All state of a run as plain data and tensors, and back
- `nbdev_trainer.loop.state`: Where a run is: the counters, the batch in hand, and what was last measured
- `nbdev_trainer.loop.steps`: What happens to one batch: the one thing to replace in order to train anything
- `nbdev_trainer.loop.trainer`: The loop: what happens from `fit` to the optimizer step, on one screen
- `nbdev_trainer.metrics.adapters`: Any function, and any metric of torchmetrics, as a metric
- `nbdev_trainer.metrics.base`: What a metric is, and the running mean on the device that most of them are made of
- `nbdev_trainer.metrics.classification`: How often the class with the highest score is the right one
- `nbdev_trainer.metrics.collection`: All metrics of one data set, read in one go
- `nbdev_trainer.store.files`: Write a file whole or not at all; read it without running anything"""

__version__ = "0.1.0"
