"""Packages whose data, transforms and networks go through the pipeline: the real ones, where they are installed."""

import numpy as np
import PIL.Image
import pytest
import torch

from nbdev_trainer import Accuracy, Learner, Step, StepOutput
from nbdev_trainer.apps.networks import named_network
from nbdev_trainer.data import (
    Boxes, Category, Data, Image, Mask, Number, PerSample, Points, Resize, StreamLoader, Text, Torchvision, random_split,
)
from nbdev_trainer.data.transforms import Flip


def package(name):
    """A package, or a skipped test with the reason; one that is there and broken is as good as none."""
    try:
        return pytest.importorskip(name, exc_type=ImportError)
    except RuntimeError as error:  # torchvision without a build for this torch
        pytest.skip(f"{name} does not work here: {error}")


def batches(loader, epoch=0, start=0):
    return [(batch.inputs.tolist(), batch.targets.tolist()) for batch in loader.batches(epoch, start)]


# Hugging Face


def sentences(datasets):
    rows = {"text": [f"word{i % 7} and number {i}" for i in range(60)], "label": [i % 2 for i in range(60)]}
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def test_a_hugging_face_dataset_is_items():
    datasets = package("datasets")
    fields = {"text": Text("text"), "label": Category("label")}
    found = sentences(datasets)
    data = Data(found, fields, inputs="text", targets="label", split=random_split(valid=0.2, seed=0))
    assert batches(data.loaders(8, seed=0, num_workers=2).train) == batches(data.loaders(8, seed=0).train)
    assert data.check(every_item=True).ok
    assert data.fingerprint()["items"] == 60
    both = datasets.DatasetDict(train=found, test=found)
    with pytest.raises(TypeError, match=r"One of its values, items\['train'\]\?"): Data(both, fields, inputs="text")


def test_pictures_of_a_hugging_face_dataset():
    datasets = package("datasets")
    draw = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(draw.integers(0, 255, (20 + i % 3, 30, 3), np.uint8)) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    found = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(20)]}, features=features)
    data = Data(found, {"image": Image("image"), "label": Category("label")}, inputs="image", targets="label",
                transforms=[Resize(16)])
    loader = data.loaders(8, seed=0).train
    batch = next(iter(loader))
    assert batch.inputs.shape == (8, 3, 16, 16)
    first = PIL.Image.fromarray(np.asarray(found[int(batch.ids[0])]["image"]))
    alone = Data([first], {"image": Image()}, inputs="image", transforms=[Resize(16)])
    assert torch.equal(next(iter(alone.loaders().train)).inputs[0], batch.inputs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hugging_face_stream_goes_on_where_it_was(workers):
    datasets = package("datasets")

    def loader():
        fields = {"text": Text("text", tokenizer=str.split, vocab=["<pad>", "<unknown>", "and"]),
                  "label": Number("label")}
        return StreamLoader(sentences(datasets).to_iterable_dataset(), fields, inputs="text", targets="label",
                            batch_size=8, num_workers=workers, workers="threads")

    whole = batches(loader())
    assert len(whole) == 8
    stopped, again = loader(), loader()
    running = stopped.batches(0)
    for _ in range(3): next(running)
    again.load_state_dict(stopped.state_dict())  # its own: the examples before are not read again
    assert again.state_dict()["source"] is not None
    assert batches(again, 0, 3) == whole[3:]
    assert batches(again, 1) == whole  # and nothing is missing from the next epoch
    running.close()
    assert batches(stopped, 0, 3) == whole[3:]


# torchvision and timm


def annotated():
    draw = np.random.default_rng(0)
    return [{"image": draw.integers(0, 255, (40, 60, 3), np.uint8), "mask": draw.integers(0, 3, (40, 60), np.uint8),
             "boxes": [[5, 6, 30, 20], [20, 10, 50, 39]], "labels": [1, 2], "points": [[5, 6], [59, 39]]} for _ in range(8)]


FIELDS = {"image": Image("image"), "mask": Mask("mask", classes=["a", "b", "c"]), "boxes": Boxes("boxes"),
          "labels": Category("labels", per="boxes", vocab=[0, 1, 2]), "points": Points("points")}


def described(*steps, names=tuple(FIELDS)):
    return Data(annotated(), {name: FIELDS[name] for name in names}, inputs=list(names), train_transforms=steps)


def test_a_transform_of_torchvision_moves_everything_as_ours_does():
    v2 = package("torchvision.transforms.v2")
    names = [name for name in FIELDS if name != "points" or hasattr(package("torchvision.tv_tensors"), "KeyPoints")]
    theirs, ours = Torchvision(v2.RandomHorizontalFlip(p=1)), Flip(p=1)
    one, other = (next(iter(described(step, names=names).loaders(4, seed=0).train)).inputs for step in (theirs, ours))
    for name in names:
        for mine, yours in zip(one[name], other[name], strict=True):
            # torchvision turns a point at x into width - 1 - x, ours into width - x, as boxes are turned
            assert (mine - yours).abs().max() <= (1 if name == "points" else 0), name


def test_random_transforms_of_torchvision_draw_the_same_in_workers():
    v2 = package("torchvision.transforms.v2")
    data = described(Torchvision(v2.Compose([v2.RandomAffine(20, translate=(0.1, 0.1)), v2.ColorJitter(0.4)])),
                     names=["image", "mask", "boxes", "labels"])
    for n in (1, 2):
        for one, other in zip(data.loaders(3, seed=0).train, data.loaders(3, seed=0, num_workers=n).train, strict=True):
            assert torch.equal(one.inputs["image"], other.inputs["image"])
            assert all(map(torch.equal, one.inputs["boxes"], other.inputs["boxes"]))


def test_a_detector_of_torchvision_takes_our_batches():
    detection = package("torchvision.models.detection")
    fields = {"image": Image("image", collation="list"), "boxes": Boxes("boxes"),
              "labels": Category("labels", per="boxes", vocab=[0, 1, 2])}
    data = Data(annotated(), fields, inputs="image", targets=PerSample("boxes", "labels"),
                split=random_split(valid=0.25, seed=0))

    class Detect(Step):
        def train(self, trainer, batch):
            return StepOutput(loss=sum(trainer.model(batch.inputs, batch.targets).values()))

        def evaluate(self, trainer, batch): return self.predict(trainer, batch)

        def predict(self, trainer, batch):
            return StepOutput(predictions=trainer.model(batch.inputs))

    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96)
    learner = Learner(model, data.loaders(3, seed=0), step=Detect(), lr=1e-4, seed=0)
    learner.fit(1)
    assert np.isfinite(learner.history["train_loss"][0])
    found = learner.predict(learner.loaders.valid).predictions
    assert len(found) == 2 and set(found[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_networks_by_name_train(name):
    package(name.split(":")[0])
    data = Data(annotated(), {"image": FIELDS["image"], "label": Category(lambda item: int(item["image"].mean()) % 2,
                                                                         vocab=[0, 1])},
                inputs="image", targets="label", transforms=[Resize(32)])
    model = named_network(name, 3, 2, pretrained=False)
    learner = Learner(model, data.loaders(4, seed=0), metrics=[Accuracy()], lr=1e-3, seed=0)
    learner.fit(1)
    assert np.isfinite(learner.history["train_loss"][0])
