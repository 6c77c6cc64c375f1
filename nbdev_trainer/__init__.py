"""A PyTorch training library written as notebooks

Modules:

- `nbdev_trainer.apps.models`: Small models to begin with, and the scaling of their inputs and outputs
- `nbdev_trainer.apps.networks`: Networks for photos: a small one that needs nothing, and those of timm and torchvision by name
- `nbdev_trainer.apps.predict`: What the model of a kept run says about new pictures or rows
- `nbdev_trainer.apps.prepare`: From a path on the command line to data that is ready for training
- `nbdev_trainer.callbacks.activation_checkpointing`: Less memory for more time: what a layer computed is thrown away, and computed again for its gradient
- `nbdev_trainer.callbacks.activations`: What the modules of a model give while it trains: spread, share of zeros, dead units, and a picture of all values
- `nbdev_trainer.callbacks.anomaly`: The line of the model whose gradient is NaN
- `nbdev_trainer.callbacks.averaging`: Weights averaged over the last steps or epochs, for evaluation and prediction: EMA and SWA
- `nbdev_trainer.callbacks.bad_batches`: Batches whose loss is no number: left out before they spoil the weights, or the end of the fit
- `nbdev_trainer.callbacks.checkpoint`: Saves the whole state of a run while it trains, so that it can go on after anything
- `nbdev_trainer.callbacks.culprits`: Who made the first number that is none: a sample, a parameter, a module, the loss, or a gradient
- `nbdev_trainer.callbacks.deterministic`: The same numbers each time: operations of torch whose results depend on the order of threads are replaced or refused
- `nbdev_trainer.callbacks.gradients`: Norms of gradients by group, part or parameter, and how large each update is beside its weights
- `nbdev_trainer.callbacks.interruptions`: Ends a fit between two batches when the process is asked to end, so that it can go on exactly there
- `nbdev_trainer.callbacks.loggers`: The history on disk while it grows: a line of JSON per row, or a CSV table
- `nbdev_trainer.callbacks.mixing`: Mixup and CutMix: train on mixtures of two samples, compared with the targets of both
- `nbdev_trainer.callbacks.nonfinite`: Ends a fit at the first batch whose loss or gradient is no number, and names who made it
- `nbdev_trainer.callbacks.profiling`: The operators that a few batches spend their time in, as a table and as a trace file
- `nbdev_trainer.callbacks.progress`: What a run shows while it trains: a bar that moves, a table and a curve that stay
- `nbdev_trainer.callbacks.rates`: Learning rates that depend on results, and the schedulers of torch
- `nbdev_trainer.callbacks.ray_reports`: Each row of the history for Ray Train, with the newest checkpoint
- `nbdev_trainer.callbacks.recorder`: Keeps the history of a run: when a row is made, what is in it, and who else gets it
- `nbdev_trainer.callbacks.resume`: Goes on with a saved run in a new process, at the next batch, or says why that cannot be
- `nbdev_trainer.callbacks.run_directory`: Keeps a run in a directory while it trains: how it was made, and what it measured
- `nbdev_trainer.callbacks.stopping`: Ending a fit when nothing gets better any more
- `nbdev_trainer.callbacks.timing`: Where the time of a fit goes: waiting for data, copy, forward, backward, step, callbacks, validation
- `nbdev_trainer.callbacks.trackers`: The same rows for TensorBoard, Weights & Biases and MLflow
- `nbdev_trainer.cli`: Train a model from the command line
- `nbdev_trainer.core.duration`: How long to train, how often to validate: a number and its unit
- `nbdev_trainer.core.errors`: Helpers that make an error message say what happened, what was expected, and what to do
- `nbdev_trainer.core.messages`: What the library says while it works: a line for a person, and the same line for Python's `logging`
- `nbdev_trainer.core.nested`: Work on every tensor of a batch, whatever containers it comes in
- `nbdev_trainer.core.seeding`: Same seed, same numbers: global generators that can be kept and put back, and orders that need no generator
- `nbdev_trainer.core.signals`: Which signals ask a program to end, when one more is another request, and which processes they are not for
- `nbdev_trainer.core.wrapping`: Something around a method of one object, for a while
- `nbdev_trainer.data.adapters`: Transforms of Albumentations and of torchvision, with boxes, labels, masks and points in step
- `nbdev_trainer.data.annotations`: Images with boxes, from the files of Pascal VOC and of COCO
- `nbdev_trainer.data.archives`: Unpack zip, tar and gz files: whole or not at all, and never outside of their folder
- `nbdev_trainer.data.augment`: Whole batches on the device: normalised, recoloured, erased, with noise; drawn for each sample from its key
- `nbdev_trainer.data.batch`: What a loader yields and what a step answers: two small dataclasses and the one rule that turns a loader's output into a `Batch`
- `nbdev_trainer.data.catalog`: Well-known small data sets by name: what each holds, under which licence, and the sha256 of its files
- `nbdev_trainer.data.color`: Brightness, contrast, saturation, hue, blur, grey, erased parts: transforms that change pixels and move nothing
- `nbdev_trainer.data.data_check`: Every stage of a pipeline with shape, range and time, and what is odd about the items, before any training
- `nbdev_trainer.data.datasets`: A small data set that comes with the library, and a dozen and more that are fetched by name
- `nbdev_trainer.data.download`: Fetch a file whose size and sha256 are known: with progress, resumed after a cut, and never a wrong one
- `nbdev_trainer.data.geometry`: Move an image, its mask, its boxes and its points by one matrix, so that they stay together
- `nbdev_trainer.data.items`: Lists of files to learn from, and readers that get a label or a mask for one out of its name, its folder, or a table
- `nbdev_trainer.data.kinds`: What a field of a sample means: how it is read, becomes a tensor, goes into a batch, and comes back
- `nbdev_trainer.data.leaks`: What is on two sides of a split: the same file under two names, the same patient, the same hour
- `nbdev_trainer.data.lines`: Texts with one sample on each line: sentences, translations, and time series
- `nbdev_trainer.data.loaders`: Batches of samples in an order that is a pure function of seed and epoch, and the train, valid and test sets in one place
- `nbdev_trainer.data.oddities`: What may be odd about a description and about numbers: an answer among the inputs, draws in validation, a column that was cut off
- `nbdev_trainer.data.pictures`: Images, and what lies on them: masks, boxes and points
- `nbdev_trainer.data.pipeline`: `Data`: items, what they mean, how they are split and transformed; from there to loaders, in one place
- `nbdev_trainer.data.readers`: Read a folder in the format of MNIST, or a CSV file of numbers, into tensors
- `nbdev_trainer.data.reading`: Read items every time, keep what was read, or read all of them at once
- `nbdev_trainer.data.rows`: Tables as lists of rows, from CSV, Parquet or a DataFrame
- `nbdev_trainer.data.samplers`: Which samples make up which batch: in order, shuffled, weighted, balanced, by length, by a budget of tokens
- `nbdev_trainer.data.samples`: What a transform of a sample is, and how image, mask, boxes and points move together
- `nbdev_trainer.data.sending`: What is sent between processes and to a device: samples with few open files, errors with all that was said of them
- `nbdev_trainer.data.sequence_transforms`: Shift, scale and disturb series and recordings; cut texts, and drop words of them
- `nbdev_trainer.data.sequences`: Texts, tokens, series and sound: kinds of values that have a length
- `nbdev_trainer.data.show`: Samples as people see them: pictures with what lies on them, curves, or a table
- `nbdev_trainer.data.sound`: Recordings from files
- `nbdev_trainer.data.sources`: From an item to a sample, from samples to a batch: one path, the same for every kind and for every worker
- `nbdev_trainer.data.splits`: Which samples are trained on and which are held out
- `nbdev_trainer.data.splits_by`: Splits that look at the items: by class, group, folder, value or time, and in folds
- `nbdev_trainer.data.streams`: Sources without a length, several loaders as one, and loaders that change from epoch to epoch
- `nbdev_trainer.data.transforms`: Resize, crop, flip, turn, see from the side: transforms that move what is in a picture
- `nbdev_trainer.data.values`: Raw values as people give them, made plain: gaps, numbers, labels, and arrays that belong to somebody else
- `nbdev_trainer.data.warp`: Flip, turn, zoom, shift, shear and tilt a whole batch in one resampling; masks, boxes and points follow
- `nbdev_trainer.data.workers`: Read the samples of a batch here, in threads or in other processes: the batches are the same
- `nbdev_trainer.learner`: A model, data and a loss, put together with the usual choices: the composition root
- `nbdev_trainer.loop.advice`: Where an error happened, and what to do about the mistakes that torch's own messages explain least
- `nbdev_trainer.loop.callback`: Code of one's own at the events of the loop: classes with a method per event, checked when they are defined
- `nbdev_trainer.loop.capture`: Work that is recorded once and played again without Python: a CUDA graph, or a tape for any device
- `nbdev_trainer.loop.clipping`: Limits for gradients, between the backward pass and the step: by norm, by value, or by the size of the weights
- `nbdev_trainer.loop.control`: Calling handlers, asking the loop for something, attaching functions: what callbacks and steps do with a trainer
- `nbdev_trainer.loop.engine`: Where and how a step runs: the device, the weight of each gradient, and the order in which gradients become a step
- `nbdev_trainer.loop.evaluation`: Passes over data that change nothing: validation, test and prediction
- `nbdev_trainer.loop.events`: The one list of moments in a run at which a callback can act
- `nbdev_trainer.loop.groups`: Which parameters train, and at which rate: parts of a model by name, type or depth; frozen batch norm; groups of an optimizer
- `nbdev_trainer.loop.losses`: Losses that torch does not have: focal loss, Dice loss, quantile loss
- `nbdev_trainer.loop.memory_format`: Images and the weights of convolutions with the channels of a pixel side by side: the same numbers in another order of memory
- `nbdev_trainer.loop.micro_batches`: A batch that does not fit into memory, trained in parts: the same gradient, less memory, also after it has run out
- `nbdev_trainer.loop.optimizers`: The default optimizer, AdamW without the overhead, and the state of any optimizer by parameter name
- `nbdev_trainer.loop.plan`: What one call of `fit` was asked to do: how long to train, when to validate, which learning rate at which step
- `nbdev_trainer.loop.recordable`: What of a training step can be recorded as a CUDA graph, and what is refused
- `nbdev_trainer.loop.repeated`: Optimizers that ask for the loss again within a step: LBFGS, SAM, and any other that needs a closure
- `nbdev_trainer.loop.scheduled`: What a schedule changes in an optimizer: learning rates, momentum, weight decay
- `nbdev_trainer.loop.schedules`: Learning rates over a fit, as pure functions of progress
- `nbdev_trainer.loop.settings`: What decides the result of a run, as plain data, and what differs between two of them
- `nbdev_trainer.loop.snapshot`: All state of a run as plain data and tensors, and back
- `nbdev_trainer.loop.state`: Where a run is: the counters, the batch in hand, and what was last measured
- `nbdev_trainer.loop.step_graph`: The whole training step as one CUDA graph: forward, loss, backward, clipping and optimizer, started by one call
- `nbdev_trainer.loop.steps`: What happens to one batch: the one thing to replace in order to train anything
- `nbdev_trainer.loop.trainer`: The loop: what happens from `fit` to the optimizer step, on one screen
- `nbdev_trainer.metrics.adapters`: Any function, and any metric of torchmetrics, as a metric
- `nbdev_trainer.metrics.base`: What a metric is, and the running mean on the device that most of them are made of
- `nbdev_trainer.metrics.classification`: How often a classifier is right: one class of many, yes or no, several labels, the first k
- `nbdev_trainer.metrics.collection`: All metrics of one data set, read in one go
- `nbdev_trainer.metrics.confusion`: Precision, recall, F-beta, Dice, IoU, MCC, kappa: all that follows from which class was taken for which
- `nbdev_trainer.metrics.probabilities`: Log loss, Brier score, calibration: whether a probability of 0.8 is right in eight of ten cases
- `nbdev_trainer.metrics.ranking`: AUROC and average precision: how well scores sort, whatever the threshold
- `nbdev_trainer.metrics.regression`: Errors and correlations of predicted numbers
- `nbdev_trainer.metrics.tasks`: What scores and targets mean, and what becomes of one value per class
- `nbdev_trainer.metrics.text`: Perplexity, BLEU, word and character error rate
- `nbdev_trainer.scale.agreeing`: The message of each step: counts, time and requests, which all processes follow at the same batch
- `nbdev_trainer.scale.compilation`: torch.compile for the model of a run, in place: the same names, the same files, less time
- `nbdev_trainer.scale.empty_weights`: Fill the weights of a model that was built without numbers
- `nbdev_trainer.scale.exchange`: What processes tell each other: sums behind metrics, requests, and the state of a run
- `nbdev_trainer.scale.failures`: What a process says when it fails, when another does, and when it hangs
- `nbdev_trainer.scale.float8`: Matrix products of linear layers in 8 bits, by torchao; everything else in bf16
- `nbdev_trainer.scale.launch`: A function in several processes of this machine, from a notebook or a script
- `nbdev_trainer.scale.own_loaders`: Loaders that each process has of its own: whether it takes a part or all, and whether its length can be relied on
- `nbdev_trainer.scale.precision`: Fewer bits for speed and memory, or more for exactness: bf16 and fp16 by autocast, pure bf16, double, TF32
- `nbdev_trainer.scale.processes`: Which of several processes this one is, and how they talk to each other
- `nbdev_trainer.scale.ray`: The function that `launch` runs, in workers of Ray Train on any number of machines
- `nbdev_trainer.scale.reading`: Which batches each of several processes reads, and how many
- `nbdev_trainer.scale.replicas`: Several processes with a copy of the model each, and one gradient
- `nbdev_trainer.scale.shards`: Several processes that share the weights of one model between them
- `nbdev_trainer.scale.strategies`: Which strategy a run gets, from how its process was started
- `nbdev_trainer.scale.synced_norms`: Batch norms over the batch of all processes
- `nbdev_trainer.scale.together`: A fit of several processes, however the model lies in them
- `nbdev_trainer.store.checkpoints`: The states of a run on the disk: write one, find the newest that is sound, remove those that are not needed
- `nbdev_trainer.store.curves`: A picture of a history as SVG text, made without any package
- `nbdev_trainer.store.files`: Write a file whole or not at all; read it without running anything
- `nbdev_trainer.store.foreign`: Weights out of files that others have made, also those of `torch.save`, without running anything in them
- `nbdev_trainer.store.history`: What a run measured: a row per epoch, a record now and then per step, as plain data and as pictures
- `nbdev_trainer.store.lines`: Rows in a file that grows: one line of JSON each
- `nbdev_trainer.store.lock`: One process at a time in a directory
- `nbdev_trainer.store.pieces`: Tensors that several processes keep in parts: divide them, write each part, read any part of the whole
- `nbdev_trainer.store.run`: One directory is one run: open it, or list all runs in a table
- `nbdev_trainer.store.sealed`: Directories that are complete or not there, and prove it
- `nbdev_trainer.store.tables`: Rows of numbers as lines of text and as HTML
- `nbdev_trainer.store.trees`: The state of a run taken apart into JSON and tensors, and put together again
- `nbdev_trainer.store.weights`: Weights into a model: all of them or none, or what fits, with a report of the rest
- `nbdev_trainer.store.writers`: One sealed directory that several processes write together
- `nbdev_trainer.testing`: Tiny data and models, and a check for callbacks of one's own
- `nbdev_trainer.use.batch_sizes`: Find a batch size: double it until memory runs out or nothing gets faster, and put everything back
- `nbdev_trainer.use.check`: One batch through everything, before training; afterwards all is as it was
- `nbdev_trainer.use.choices`: What the learner chooses when it is not told: loss, optimizer, learning rates
- `nbdev_trainer.use.data_checks`: Mistakes that can be seen in the data: values, scales, labels, order, overlap
- `nbdev_trainer.use.data_report`: What is in a data set, and what in it is odd, before any training
- `nbdev_trainer.use.environment`: Versions, devices and settings, for a bug report
- `nbdev_trainer.use.evidence`: What one batch, a few steps and a handful of other batches tell about a set-up
- `nbdev_trainer.use.findings`: What a look at a set-up found: what is wrong, how to mend it, and a short report
- `nbdev_trainer.use.loss_checks`: Mistakes between predictions, targets and loss
- `nbdev_trainer.use.model_checks`: Mistakes in model and optimizer: what does not learn, and why
- `nbdev_trainer.use.rehearsal`: Can the model learn two batches by heart, and does everything work that a fit will do? Both without a trace
- `nbdev_trainer.use.reproduce`: What makes a run not repeat, and how to mend it, before it has run
- `nbdev_trainer.use.summary`: What a model is made of, for a real batch: shapes, parameters, work and memory of each layer
- `nbdev_trainer.use.tune`: Find a learning rate by a range test: let it rise, watch the loss, and put everything back
- `nbdev_trainer.use.undisturbed`: Train, break and measure inside a block; afterwards the run is as if nothing had happened"""

from nbdev_trainer.callbacks.activation_checkpointing import ActivationCheckpointing
from nbdev_trainer.callbacks.activations import ActivationStatistics
from nbdev_trainer.callbacks.anomaly import AnomalyDetection
from nbdev_trainer.callbacks.averaging import EMA, SWA
from nbdev_trainer.callbacks.bad_batches import BadBatches
from nbdev_trainer.callbacks.checkpoint import Checkpoint
from nbdev_trainer.callbacks.deterministic import Deterministic
from nbdev_trainer.callbacks.gradients import GradientNorms
from nbdev_trainer.callbacks.interruptions import Interruptions
from nbdev_trainer.callbacks.loggers import CSVTable, JSONLines
from nbdev_trainer.callbacks.mixing import CutMix, Mixup, MixOneOf
from nbdev_trainer.callbacks.nonfinite import NonFinite, NonFiniteError
from nbdev_trainer.callbacks.profiling import Profiler
from nbdev_trainer.callbacks.progress import Progress
from nbdev_trainer.callbacks.rates import ReduceOnPlateau, TorchScheduler
from nbdev_trainer.callbacks.ray_reports import ReportToRay
from nbdev_trainer.callbacks.recorder import Recorder
from nbdev_trainer.callbacks.run_directory import RunDirectory
from nbdev_trainer.callbacks.stopping import EarlyStopping, FiniteLoss
from nbdev_trainer.callbacks.timing import TimeSplit
from nbdev_trainer.callbacks.trackers import MLflow, TensorBoard, WeightsAndBiases
from nbdev_trainer.core.duration import Duration
from nbdev_trainer.core.seeding import seed_everything
from nbdev_trainer.data.batch import Batch, StepOutput, from_dict
from nbdev_trainer.data.datasets import digits
from nbdev_trainer.data.loaders import Loader, Loaders
from nbdev_trainer.data.readers import read_mnist_folder, read_numeric_csv
from nbdev_trainer.data.splits import random_split
from nbdev_trainer.learner import Learner
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.capture import Tape
from nbdev_trainer.loop.engine import Precision, Strategy
from nbdev_trainer.loop.evaluation import Predictions
from nbdev_trainer.loop.events import Event
from nbdev_trainer.loop.groups import weight_decay_groups
from nbdev_trainer.loop.losses import BinaryFocalLoss, DiceLoss, FocalLoss, QuantileLoss
from nbdev_trainer.loop.optimizers import FusedAdamW
from nbdev_trainer.loop.repeated import SAM
from nbdev_trainer.loop.schedules import (
    Schedule, chained, constant, cosine, cosine_restarts, flat_then_cosine, inverse_square_root, linear, one_cycle,
    polynomial, stairs, warm_up,
)
from nbdev_trainer.loop.state import State
from nbdev_trainer.loop.steps import ManualStep, Step, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.adapters import WholeSet
from nbdev_trainer.metrics.base import Additive, Kept, Loss, Mean, Metric
from nbdev_trainer.metrics.classification import Accuracy, BinaryAccuracy, MultilabelAccuracy, TopKAccuracy
from nbdev_trainer.metrics.confusion import (
    CohenKappa, ConfusionMatrix, Dice, F1Score, FBetaScore, IoU, MatthewsCorrelation, PrecisionScore,
    RecallScore, confusion_matrix,
)
from nbdev_trainer.metrics.probabilities import BrierScore, CalibrationError, LogLoss
from nbdev_trainer.metrics.ranking import AUROC, AveragePrecision
from nbdev_trainer.metrics.regression import (
    ExplainedVariance, MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, PearsonCorrelation,
    R2, RootMeanSquaredError, SpearmanCorrelation,
)
from nbdev_trainer.metrics.text import BLEU, CharErrorRate, Perplexity, WordErrorRate
from nbdev_trainer.scale.compilation import compile_model, uncompile_model
from nbdev_trainer.scale.float8 import Float8
from nbdev_trainer.scale.launch import launch
from nbdev_trainer.scale.processes import Processes, join
from nbdev_trainer.scale.ray import ray_trainer
from nbdev_trainer.scale.replicas import Replicas
from nbdev_trainer.scale.shards import Shards
from nbdev_trainer.store.checkpoints import list_checkpoints, read_checkpoint
from nbdev_trainer.store.foreign import import_weights
from nbdev_trainer.store.history import History, plot_histories
from nbdev_trainer.store.run import Run, RunTable
from nbdev_trainer.store.sealed import DamagedError
from nbdev_trainer.store.weights import LoadReport
from nbdev_trainer.use.batch_sizes import BatchSizes, batch_size_find
from nbdev_trainer.use.check import check
from nbdev_trainer.use.findings import CheckReport, Finding
from nbdev_trainer.use.summary import ModelSummary, summarize
from nbdev_trainer.use.tune import RangeTest, lr_find

__version__ = "0.1.0"

__all__ = [
    "AUROC", "Accuracy", "ActivationCheckpointing", "ActivationStatistics", "Additive", "AnomalyDetection",
    "AveragePrecision", "BLEU", "BadBatches", "Batch", "BatchSizes", "BinaryAccuracy", "BinaryFocalLoss",
    "BrierScore", "CSVTable", "CalibrationError", "Callback", "CharErrorRate", "CheckReport", "Checkpoint",
    "CohenKappa", "ConfusionMatrix", "CutMix", "DamagedError", "Deterministic", "Dice", "DiceLoss",
    "Duration", "EMA", "EarlyStopping", "Event", "ExplainedVariance", "F1Score", "FBetaScore", "Finding",
    "FiniteLoss", "Float8", "FocalLoss", "FusedAdamW", "GradientNorms", "History", "Interruptions", "IoU",
    "JSONLines", "Kept", "Learner", "LoadReport", "Loader", "Loaders", "LogLoss", "Loss", "MLflow",
    "ManualStep", "MatthewsCorrelation", "Mean", "MeanAbsoluteError", "MeanAbsolutePercentageError",
    "MeanSquaredError", "Metric", "MixOneOf", "Mixup", "ModelSummary", "MultilabelAccuracy", "NonFinite",
    "NonFiniteError", "PearsonCorrelation", "Perplexity", "Precision", "PrecisionScore", "Predictions",
    "Processes", "Profiler", "Progress", "QuantileLoss", "R2", "RangeTest", "RecallScore", "Recorder",
    "ReduceOnPlateau", "Replicas", "ReportToRay", "RootMeanSquaredError", "Run", "RunDirectory", "RunTable",
    "SAM", "SWA", "Schedule", "Shards", "SpearmanCorrelation", "State", "Step", "StepOutput", "Strategy",
    "SupervisedStep", "Tape", "TensorBoard", "TimeSplit", "TopKAccuracy", "TorchScheduler", "Trainer",
    "WeightsAndBiases", "WholeSet", "WordErrorRate", "batch_size_find", "chained", "check", "compile_model",
    "confusion_matrix", "constant", "cosine", "cosine_restarts", "digits", "flat_then_cosine", "from_dict",
    "import_weights", "inverse_square_root", "join", "launch", "linear", "list_checkpoints", "lr_find",
    "one_cycle", "plot_histories", "polynomial", "random_split", "ray_trainer", "read_checkpoint",
    "read_mnist_folder", "read_numeric_csv", "seed_everything", "stairs", "summarize", "uncompile_model",
    "warm_up", "weight_decay_groups",
]
