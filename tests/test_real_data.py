"""Real data sets, from their files through the pipeline to a model that learns, and their traps, reported."""

import math
import os
from pathlib import Path

import pytest
import torch
from helpers import one_thread  # noqa: F401  # a fixture for every test here
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import Accuracy, Additive, Learner, R2, Step, StepOutput
from nbdev_trainer.data import (
    Audio,
    Boxes,
    ByLength,
    Cache,
    Category,
    Data,
    Image,
    Mask,
    Normalize,
    Number,
    Numbers,
    PerSample,
    Series,
    Text,
    TokenBudget,
    annotation_problems,
    image_files,
    parent_name,
    read_voc,
)
from nbdev_trainer.data.datasets import fetch
from nbdev_trainer.data.items import Beside, FromName, content_hash, find_files
from nbdev_trainer.data.leaks import check_leaks
from nbdev_trainer.data.lines import read_parallel, read_ts
from nbdev_trainer.data.rows import read_rows
from nbdev_trainer.data.sequences import PADDING, words
from nbdev_trainer.data.sound import read_wav
from nbdev_trainer.data.splits import Split, random_split
from nbdev_trainer.data.splits_by import grouped_split, split_by_folder, split_by_predicate, split_by_value
from nbdev_trainer.data.transforms import Flip, RandomCrop, Resize
from nbdev_trainer.data.warp import RandomWarp

SEED = 0  # every bound below holds for the seeds 0 to 3


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A function that gives the folder of a data set; it skips the test where the set is not there."""
    cache = tmp_path_factory.mktemp("sets")

    def folder_of(name):
        given = os.environ.get("NBDEV_TRAINER_DATA", "")
        if not given:
            pytest.skip("NBDEV_TRAINER_DATA does not name a folder with data sets")
        if not (Path(given) / name).is_dir():
            pytest.skip(f"the folder named by NBDEV_TRAINER_DATA has no {name}")
        return fetch(name, cache, progress=False)

    return folder_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(SEED)


def trained(model, loaders, n, lr, **options):
    """A learner after `n` epochs of one cycle."""
    learner = Learner(model, loaders, verbose=0, seed=SEED, device="cpu", **options)
    learner.fit_one_cycle(n, lr=lr)
    return learner


# Photos in folders


def test_photos_of_ants_and_bees(data_set):
    items = image_files(data_set("hymenoptera"))
    data = Data(
        items,
        {"photo": Image(), "insect": Category(parent_name)},
        inputs="photo",
        targets="insect",
        split=split_by_folder(),
        transforms=[Resize(64, "crop")],
        train_transforms=[RandomCrop(64, padding=4), Flip()],
        batch_transforms=[Normalize.imagenet()],
        cache=Cache("300MB"),
    )
    assert data.classes == ["ants", "bees"]
    assert [len(rows) for rows in (data.split.train, data.split.valid)] == [84, 45]
    check_leaks(items, data.split)
    (grey,) = data.check(every_item=True).problems
    assert "1 image holds no colour" in grey and "290082189_f66cb80bfc.jpg" in grey
    loaders = data.loaders(8, seed=SEED)
    batch = next(loaders.train.batches(0))
    assert batch.inputs.shape == (8, 3, 64, 64) and batch.targets.dtype == torch.int64
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(12), nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    learner = trained(model, loaders, 16, 3e-3, metrics=[Accuracy()])
    # 84 photos do not teach what makes a bee. That a network learns them by heart shows that each has its
    # label.
    assert learner.validate(loaders.train)["accuracy"] >= 0.85  # ants alone: 0.56


def test_streets_pixel_by_pixel(data_set):
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    items = image_files(data_set("camvid"), extensions=".jpg")
    mask = Mask(Beside("../{parent}annot/{stem}.png"), classes=names, ignore_index=11)
    data = Data(
        items,
        {"street": Image(), "mask": mask},
        inputs="street",
        targets="mask",
        split=split_by_folder(),
        transforms=[Resize((72, 96))],
        train_batch_transforms=[RandomWarp(flip=0.5)],
        batch_transforms=[Normalize.imagenet()],
    )
    loaders = data.loaders(8, seed=SEED, in_memory=True)
    batch = next(loaders.train.batches(0))
    assert (batch.inputs.shape, batch.targets.shape) == ((8, 3, 72, 96), (8, 72, 96))
    assert batch.targets.dtype == torch.int64 and batch.targets.max() == 11
    strict = Data(items, {"mask": Mask(mask.reader, classes=names)}, inputs="mask", split=data.split)
    assert "a mask holds the class 11; there are 11 classes" in str(strict.check())

    def block(n_in, n, stride=1):
        return [nn.Conv2d(n_in, n, 3, stride, 1), nn.BatchNorm2d(n), nn.ReLU()]

    model = nn.Sequential(
        *block(3, 16, 2),
        *block(16, 32, 2),
        *block(32, 32),
        nn.Conv2d(32, 11, 1),
        nn.Upsample((72, 96), mode="bilinear"),
    )
    learner = trained(model, loaders, 6, 1e-2, metrics=[Accuracy(ignore_index=11)])
    assert learner.history["valid_accuracy"][-1] >= 0.5  # road alone: 0.31


# Boxes


class GridDetector(nn.Module):
    """A detector with the interface of torchvision's: losses by name in training, detections otherwise."""

    def __init__(self, n_classes, size, depth, width=16, threshold=0.4):
        super().__init__()
        self.n_classes, self.size, self.threshold, self.cell = n_classes, size, threshold, 2**depth
        layers, n_in = [], 3
        for stride in [2] * depth + [1]:
            layers += [nn.Conv2d(n_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            n_in, width = width, min(2 * width, 64)
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(n_in, n_classes + 4, 1)
        nn.init.constant_(self.head.bias[:n_classes], -3)

    def forward(self, images, targets=None):
        shapes = torch.tensor([[one.shape[2], one.shape[1]] for one in images]).repeat(1, 2).float()
        frame = torch.tensor([self.size[1], self.size[0]]).repeat(2).float()
        resized = [F.interpolate(one[None], self.size, mode="bilinear", antialias=True) for one in images]
        found = self.head(self.body(torch.cat(resized)))
        scores, places = found.split([self.n_classes, 4], dim=1)
        if self.training:
            return self.losses(
                scores,
                places,
                [{**one, "boxes": one["boxes"] * (frame / shape)} for one, shape in zip(targets, shapes)],
            )
        return [self.detections(*one, shape / frame) for *one, shape in zip(scores, places, shapes)]

    def centres(self, height, width):
        x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
        return torch.stack([x, y], dim=2) * self.cell

    def losses(self, scores, places, targets):
        truth = torch.zeros_like(scores)
        height, width = scores.shape[2:]
        boxes, cells = [], []
        for number, target in enumerate(targets):
            x, y = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 / self.cell).long().unbind(1)
            x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
            truth[number, target["labels"], y, x] = 1
            cells.append(places[number, :, y, x].T)
            boxes.append(self.encoded(target["boxes"], self.centres(height, width)[y, x]))
        n = max(1, sum(map(len, boxes)))
        shares = scores.sigmoid()
        wrong = (shares - truth).abs() ** 2
        focal = (F.binary_cross_entropy_with_logits(scores, truth, reduction="none") * wrong).sum() / n
        return {
            "class": focal,
            "box": F.smooth_l1_loss(torch.cat(cells), torch.cat(boxes), reduction="sum") / n,
        }

    def encoded(self, boxes, centres):
        middle, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        return torch.cat([(middle - centres) / self.cell, (extent / self.cell / 4).log()], dim=1)

    def detections(self, scores, places, scale):
        shares = scores.sigmoid()
        peaks = shares * (shares == F.max_pool2d(shares[None], 3, 1, 1)[0])
        labels, y, x = (peaks > self.threshold).nonzero().unbind(1)
        moved = places[:, y, x].T
        middle = self.centres(*scores.shape[1:])[y, x] + moved[:, :2] * self.cell
        extent = moved[:, 2:].clamp(-4, 4).exp() * 4 * self.cell
        boxes = torch.cat([middle - extent / 2, middle + extent / 2], dim=1) * scale
        return {"boxes": boxes, "labels": labels, "scores": shares[labels, y, x]}


class DetectionStep(Step):
    """Targets go into the model in training, which answers with losses; without, it answers with boxes."""

    def train(self, trainer, batch):
        losses = trainer.model(batch.inputs, batch.targets)
        return StepOutput(
            loss=sum(losses.values()), logs={f"{name}_loss": one for name, one in losses.items()}
        )

    def evaluate(self, trainer, batch):
        return self.predict(trainer, batch)


def overlap(boxes, others):
    """Intersection over union of each box with each other one."""
    first, last = (
        torch.maximum(boxes[:, None, :2], others[:, :2]),
        torch.minimum(boxes[:, None, 2:], others[:, 2:]),
    )
    shared = (last - first).clamp(min=0).prod(2)
    area, other = ((one[:, 2:] - one[:, :2]).prod(1) for one in (boxes, others))
    return shared / (area[:, None] + other - shared)


class F1(Additive):
    """How many boxes are found, and how many found ones are right: each true box counts once."""

    higher_is_better = True

    def __init__(self):
        super().__init__("f1", {"hits": (), "all": ()})

    def update(self, output, batch):
        if output.predictions is None:
            return  # in training there are losses only
        sums = self.sums_on(torch.device("cpu"))
        for found, target in zip(output.predictions, batch.targets):
            sums["all"] += len(found["boxes"]) + len(target["boxes"])
            good = overlap(found["boxes"], target["boxes"]) * (found["labels"][:, None] == target["labels"])
            while good.numel() and good.max() >= 0.5:
                one, other = divmod(int(good.argmax()), good.shape[1])
                good[one], good[:, other] = 0, 0
                sums["hits"] += 2

    def compute(self):
        return self.sums()["hits"] / self.sums()["all"]


def test_raccoons_on_photos_of_all_sizes(data_set):
    folder = data_set("raccoon_voc")
    items = read_voc(folder / "images", folder / "annotations", one_based=True)
    fields = {
        "photo": Image("path", collation="list"),
        "boxes": Boxes("boxes"),
        "labels": Category("labels", per="boxes"),
    }
    data = Data(
        items,
        fields,
        inputs="photo",
        targets=PerSample("boxes", "labels"),
        split=grouped_split(by=content_hash, valid=0.2, seed=SEED),
        train_batch_transforms=[RandomWarp(flip=0.5)],
        cache=Cache("300MB"),
    )
    check_leaks(items, data.split)
    report = str(data.check(every_item=True))
    assert "3 images hold no colour" in report and all(f"raccoon-{n}.jpg" in report for n in (150, 152, 161))
    assert "2 files are there twice" in report and all(
        f"raccoon-{n}.jpg" in report for n in (65, 98, 83, 120)
    )
    loaders = data.loaders(8, seed=SEED)
    batch = next(loaders.train.batches(0))
    assert isinstance(batch.inputs, list) and len({one.shape for one in batch.inputs}) > 1
    assert [set(one) for one in batch.targets] == [{"boxes", "labels"}] * 8
    for image, target in zip(batch.inputs, batch.targets):
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert (target["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
    learner = trained(
        GridDetector(1, (96, 96), 4, threshold=0.25), loaders, 4, 3e-3, step=DetectionStep(), metrics=[F1()]
    )
    assert learner.history["valid_f1"][-1] >= 0.15 and math.isnan(learner.history["train_f1"][-1])


def test_a_photo_on_both_sides_is_reported(data_set):
    folder = data_set("raccoon_voc")
    items = read_voc(folder / "images", folder / "annotations")
    data = Data(
        items,
        {"boxes": Boxes("boxes")},
        inputs="boxes",
        split=split_by_predicate(lambda item: item.path.stem in ("raccoon-65", "raccoon-83")),
    )
    report = str(data.check())
    assert (
        "the same file is on two sides of the split" in report and "grouped_split(by=content_hash)" in report
    )
    assert all(f"raccoon-{n}.jpg" in report for n in (65, 98, 83, 120))


def test_blood_cells_many_on_each_image(data_set):
    folder = data_set("bccd_voc") / "BCCD"
    parts = {
        part: (folder / f"ImageSets/Main/{part}.txt").read_text().split() for part in ("train", "val", "test")
    }
    part_of = {name: part for part, names in parts.items() for name in names}
    items = read_voc(folder / "JPEGImages", folder / "Annotations", on_bad_box="drop")
    fields = {
        "image": Image("path", collation="list"),
        "boxes": Boxes("boxes"),
        "labels": Category("labels", per="boxes"),
    }
    data = Data(
        items,
        fields,
        inputs="image",
        targets=PerSample("boxes", "labels"),
        transforms=[Resize((120, 160))],
        train_batch_transforms=[RandomWarp(flip=0.5)],
        split=split_by_value(lambda item: part_of[item.path.stem], train="train", valid="val", test="test"),
    )
    assert [len(rows) for rows in data.split.parts().values()] == [205, 87, 72, 0]
    assert data.fields["labels"].vocab == ["Platelets", "RBC", "WBC"]
    loaders = data.loaders(8, seed=SEED, in_memory=True)
    learner = trained(GridDetector(3, (120, 160), 3), loaders, 4, 5e-3, step=DetectionStep(), metrics=[F1()])
    assert learner.history["valid_f1"][-1] >= 0.45
    found = learner.predict(loaders.test).predictions
    assert len(found) == 72 and found[0]["boxes"].shape == (len(found[0]["labels"]), 4)


def test_boxes_without_area_are_reported(data_set):
    folder = data_set("bccd_voc") / "BCCD"
    items = read_voc(folder / "JPEGImages", folder / "Annotations", on_bad_box="keep")
    problems = annotation_problems(items)
    assert len(problems) == 2 and all("has no area" in text for text in problems)
    assert "BloodImage_00338" in problems[0] and "BloodImage_00343" in problems[1]
    report = str(Data(items, {"boxes": Boxes("boxes")}, inputs="boxes").check(every_item=True))
    assert "2 of 364 items cannot be read" in report and "which has no area" in report
    assert "BloodImage_00338.jpg" in report and "BloodImage_00343.jpg" in report


# Tables

ADULT = (
    "age workclass fnlwgt education education-num marital-status occupation relationship race sex "
    "capital-gain capital-loss hours-per-week native-country income"
).split()
ADULT_NUMBERS = "age fnlwgt education-num capital-gain capital-loss hours-per-week".split()
ADULT_CLASSES = [name for name in ADULT[:-1] if name not in ADULT_NUMBERS]


class OfTable(nn.Module):
    """Numbers as they are, and an embedding of each category."""

    def __init__(self, data, n_out, width=32):
        super().__init__()
        self.names = [name for name in data.inputs if name != "numbers"]
        self.embeddings = nn.ModuleList(nn.Embedding(len(data.fields[name].vocab), 8) for name in self.names)
        n_numbers = len(data.fields["numbers"].mean)
        self.layers = nn.Sequential(
            nn.Linear(n_numbers + 8 * len(self.names), width), nn.ReLU(), nn.Linear(width, n_out)
        )

    def forward(self, inputs):
        parts = [embedding(inputs[name]) for embedding, name in zip(self.embeddings, self.names)]
        return self.layers(torch.cat([inputs["numbers"].clamp(-4, 4), *parts], dim=1))


def census(folder):
    """One row in five."""
    return read_rows(
        folder / "adult.data",
        folder / "adult.test",
        names=ADULT,
        separator=",",
        missing=["?"],
        file_column="file",
    )[::5]


BY_FILE = split_by_value("file", train="adult.data", valid="adult.test")


def test_income_from_a_census(data_set):
    items = census(data_set("adult"))
    kinds = {name: Category(name, missing="unknown") for name in ADULT_CLASSES}
    fields = {
        "numbers": Numbers(ADULT_NUMBERS, standardize=True),
        **kinds,
        "income": Category(lambda row: row["income"].removesuffix(".")),
    }
    data = Data(items, fields, inputs=["numbers", *kinds], targets="income", split=BY_FILE)
    assert data.classes == ["<=50K", ">50K"] and "unknown" in data.fields["workclass"].vocab
    loaders = data.loaders(128, seed=SEED, in_memory=True)
    batch = next(loaders.train.batches(0))
    assert list(batch.inputs) == ["numbers", *ADULT_CLASSES] and batch.inputs["numbers"].shape == (128, 6)
    learner = trained(OfTable(data, 2), loaders, 5, 1e-2, metrics=[Accuracy()])
    assert learner.history["valid_accuracy"][-1] >= 0.8  # one answer for all: 0.76


def test_gaps_and_labels_with_a_full_stop_are_reported(data_set):
    items = census(data_set("adult"))
    data = Data(
        items,
        {
            "age": Number("age"),
            "work": Category("workclass", missing="unknown"),
            "income": Category("income"),
        },
        inputs=["age", "work"],
        targets="income",
        split=BY_FILE,
    )
    report = str(data.check(every_item=True))
    assert "the field 'income' has the labels ['<=50K.', '>50K.'] in 3256 items" in report
    assert "'<=50K' and '<=50K.' of the field 'income' differ only in case, spaces or points" in report
    gaps = sum(item["workclass"] is None for item in items)
    assert (
        f"the field 'work' has missing values in {gaps} of {len(items)} items" in report
        and "'unknown'" in report
    )


def test_passengers_of_the_titanic(data_set):
    items = read_rows(data_set("titanic") / "titanic_kaggle_train.csv")
    known = {
        "Sex": Category("Sex"),
        "Pclass": Category("Pclass"),
        "Embarked": Category("Embarked", missing="unknown"),
    }
    fields = {
        "numbers": Numbers(["Age", "SibSp", "Parch", "Fare"], standardize=True, missing="median"),
        **known,
        "Survived": Category("Survived"),
    }
    data = Data(
        items,
        fields,
        inputs=["numbers", *known],
        targets="Survived",
        split=random_split(valid=0.25, seed=SEED),
    )
    assert data.classes == [0, 1] and data.fields["Embarked"].vocab == ["C", "Q", "S", "unknown"]
    report = str(data.check(every_item=True))
    assert (
        "the field 'numbers' has missing values in 177 of 891 items" in report
        and "missing='median'" in report
    )
    assert "the field 'Embarked' has missing values in 2 of 891 items (first: item 61" in report
    assert (
        data.fields["numbers"].fill[0] in (28, 28.5, 29) and data.fields["Embarked"].named(None) == "unknown"
    )
    loaders = data.loaders(32, seed=SEED, in_memory=True)
    learner = trained(OfTable(data, 2, 16), loaders, 10, 1e-2, metrics=[Accuracy()])
    assert learner.history["valid_accuracy"][-1] >= 0.72  # all dead: 0.62
    strict = Data(items, {"age": Number("Age")}, inputs="age").check(every_item=True)
    assert "177 of 891 items cannot be read" in str(strict) and "missing='median'" in str(strict)


HOUSE = ["longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms"]
HOUSE += ["population", "households", "median_income"]


def test_prices_of_houses(data_set):
    items = read_rows(data_set("california_housing") / "housing.csv")[::3]
    fields = {
        "numbers": Numbers(HOUSE, standardize=True, missing="median"),
        "ocean": Category("ocean_proximity"),
        "price": Numbers("median_house_value", standardize=True),
    }
    data = Data(
        items, fields, inputs=["numbers", "ocean"], targets="price", split=random_split(valid=0.2, seed=SEED)
    )
    gaps = sum(math.isnan(item["total_bedrooms"]) for item in items)
    report = str(data.check(every_item=True))
    assert f"the field 'numbers' has missing values in {gaps} of 6880 items" in report
    assert "the field 'price' ends at 500001, which stands in" in report  # dearer houses were written down as that
    assert "column 'housing_median_age' of the field 'numbers' ends at 52" in report
    assert "1 class of 'ocean' with fewer than 2 training items: ['ISLAND']" in report
    loaders = data.loaders(128, seed=SEED, in_memory=True)
    batch = next(loaders.train.batches(0))
    assert batch.targets.shape == (128, 1) and abs(batch.targets.mean()) < 0.5
    learner = trained(OfTable(data, 1), loaders, 8, 1e-2, metrics=[R2()])
    assert learner.history["valid_r2"][-1] >= 0.6


# Texts


class BagOfWords(nn.Module):
    """The mean of the vectors of all words that are there."""

    def __init__(self, n_words, n_out, width=32):
        super().__init__()
        self.vectors, self.out = nn.Embedding(n_words, width, padding_idx=0), nn.Linear(width, n_out)
        nn.init.normal_(self.vectors.weight, std=0.1)

    def forward(self, tokens):
        there = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.out(F.dropout(self.vectors(tokens).sum(1) / there, 0.3, self.training))


def test_reviews_of_films(data_set):
    items = read_rows(data_set("imdb_sample") / "texts.csv")
    data = Data(
        items,
        {"review": Text("text", min_count=3, max_length=400), "opinion": Category("label")},
        inputs="review",
        targets="opinion",
        split=split_by_value("is_valid", valid=True),
    )
    assert [len(rows) for rows in (data.split.train, data.split.valid)] == [800, 200]
    sampler = TokenBudget([min(400, len(words(item["text"]))) for item in items], budget=8000)
    loaders = data.loaders(seed=SEED, sampler=sampler, valid_batch_size=64)
    batches = list(loaders.train.batches(0))
    assert (
        sum(len(batch.inputs) for batch in batches) == 800
        and max(batch.inputs.numel() for batch in batches) <= 8000
    )
    learner = trained(BagOfWords(len(data.fields["review"].vocab), 2), loaders, 8, 2e-2, metrics=[Accuracy()])
    assert learner.history["valid_accuracy"][-1] >= 0.68


def test_sentences_with_an_opinion(data_set):
    folder = data_set("sst2")
    items = read_rows(
        *(folder / f"{part}.tsv" for part in ("train", "dev", "test")),
        names=["text", "label"],
        file_column="file",
    )
    data = Data(
        items,
        {"text": Text("text", tokenizer="spaces", min_count=2), "label": Category("label")},
        inputs="text",
        targets="label",
        split=split_by_value("file", train="train.tsv", valid="dev.tsv", test="test.tsv"),
    )
    assert [len(rows) for rows in data.split.parts().values()] == [6920, 872, 1821, 0]
    lengths = [len(item["text"].split()) for item in items]
    loaders = data.loaders(64, seed=SEED, sampler=ByLength(lengths), in_memory=True)
    widths = [(batch.inputs != 0).sum(1) for batch in loaders.train.batches(0)]
    assert all(one.max() - one.min() <= 8 for one in widths[:5])
    learner = trained(BagOfWords(len(data.fields["text"].vocab), 2), loaders, 3, 2e-2, metrics=[Accuracy()])
    assert learner.validate(loaders.test)["accuracy"] >= 0.68


class Translator(nn.Module):
    """A reader of one language and a writer of another, with attention."""

    def __init__(self, n_read, n_write, width=64):
        super().__init__()
        self.source, self.target = nn.Embedding(n_read, width, 0), nn.Embedding(n_write, width, 0)
        self.reader, self.writer = (
            nn.GRU(width, width, batch_first=True),
            nn.GRU(width, width, batch_first=True),
        )
        self.out = nn.Linear(2 * width, n_write)

    def forward(self, source, target):
        read, state = self.reader(self.source(source))
        written, _ = self.writer(self.target(target), state)
        closeness = (written @ read.mT / 8).masked_fill((source == 0)[:, None], -math.inf)
        return self.out(torch.cat([written, closeness.softmax(2) @ read], dim=2))


class TranslationStep(Step):
    """The next word of the translation from those before it; the loss is a mean over words."""

    def train(self, trainer, batch):
        english, german = batch.inputs["english"], batch.inputs["german"]
        scores, truth = trainer.model(english, german[:, :-1]).movedim(2, 1), german[:, 1:]
        there = (truth != 0).sum()
        loss = F.cross_entropy(scores, truth, ignore_index=0, reduction="sum") / there
        return StepOutput(loss, scores, truth, there)


def test_captions_in_two_languages(data_set):
    folder = data_set("multi30k")
    parts = {part: read_parallel(folder / f"{part}.en", folder / f"{part}.de") for part in ("train", "val")}
    items = [*parts["train"][:2400], *parts["val"][:400]]
    fields = {"english": Text(0, max_vocab=1000), "german": Text(1, max_vocab=1000, ends=True)}
    data = Data(
        items, fields, inputs=["english", "german"], split=Split(torch.arange(2400), torch.arange(2400, 2800))
    )
    lengths = [len(words(english)) + len(words(german)) for english, german in items]
    loaders = data.loaders(32, seed=SEED, sampler=ByLength(lengths), in_memory=True)
    vocab = data.fields["german"].vocab
    german = next(loaders.train.batches(0)).inputs["german"]
    assert vocab[:4] == [PADDING, "<unknown>", "<start>", "<end>"] and set(german[:, 0].tolist()) == {2}
    assert (german == 3).sum(1).tolist() == [1] * 32
    learner = trained(
        Translator(1000, 1000), loaders, 2, 1e-2, step=TranslationStep(), metrics=[Accuracy(ignore_index=0)]
    )
    assert learner.history["valid_accuracy"][-1] >= 0.3  # the most frequent word: 0.1


# Sound and series


class Listener(nn.Module):
    """Convolutions over time; the padding at the end does not count."""

    def __init__(self, channels, n_out, width=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.out = nn.Linear(2 * width, n_out)

    def forward(self, series):
        there = (series != 0).any(1, keepdim=True)
        found = self.layers(series) * there
        return self.out(torch.cat([found.sum(2) / there.sum(2).clamp(min=1), found.amax(2)], dim=1))


class Spectrum(nn.Module):
    """The loudness of each pitch over time."""

    def forward(self, sound):
        found = torch.stft(sound[:, 0], 256, 128, window=torch.hann_window(256), return_complex=True).abs()
        return (found[:, :64] + 1e-3).log().add(7) * (found.sum(1, keepdim=True) > 0)


def test_spoken_digits(data_set):
    items = find_files(data_set("free_spoken_digits"), extensions=".wav")
    fields = {"sound": Audio(read_wav, sample_rate=8000), "digit": Category(FromName(r"^(\d)_"))}
    data = Data(
        items,
        fields,
        inputs="sound",
        targets="digit",
        cache=Cache("100MB"),
        split=split_by_predicate(lambda path: int(FromName(r"_(\d+)\.wav")(path)) < 5),
    )
    assert data.classes == [str(digit) for digit in range(10)]
    assert [len(rows) for rows in (data.split.train, data.split.valid)] == [600, 300]
    loaders = data.loaders(32, seed=SEED, in_memory=True)
    batch = next(loaders.train.batches(0))
    lengths = [int(one.nonzero().max()) for one in batch.inputs[:, 0]]
    assert batch.inputs.shape[:2] == (32, 1) and batch.inputs.shape[2] == max(lengths) + 1 > min(lengths) + 1
    model = nn.Sequential(Spectrum(), Listener(64, 10))
    learner = trained(model, loaders, 7, 1e-2, metrics=[Accuracy()])
    assert learner.history["valid_accuracy"][-1] >= 0.6  # by chance: 0.1


SERIES = {  # training and test cases, channels, classes, epochs, accuracy at least
    "GunPoint": (50, 150, 1, 2, 20, 0.7),
    "BasicMotions": (40, 40, 6, 4, 10, 0.7),
    "JapaneseVowels": (270, 370, 12, 9, 5, 0.85),
}


@pytest.mark.parametrize("name", SERIES)
def test_series_over_time(data_set, name):
    n_train, n_valid, channels, n_classes, epochs, bound = SERIES[name]
    folder = data_set("time_series")
    parts = [read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    items = [*parts[0], *parts[1]]
    data = Data(
        items,
        {"values": Series("values", channels=channels), "label": Category("label")},
        inputs="values",
        targets="label",
        split=Split(torch.arange(n_train), torch.arange(n_train, n_train + n_valid)),
    )
    assert len(items) == n_train + n_valid and len(data.classes) == n_classes
    loaders = data.loaders(10, seed=SEED, in_memory=True, valid_batch_size=64)
    found = {batch.inputs.shape for batch in loaders.train.batches(0)}
    assert len(found) == 1 or name == "JapaneseVowels"
    learner = trained(Listener(channels, n_classes), loaders, epochs, 1e-2, metrics=[Accuracy()])
    assert learner.history["valid_accuracy"][-1] >= bound
