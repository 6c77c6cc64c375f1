"""The data pipeline at its edges: odd names, odd numbers, and arrays that belong to somebody else."""

import json

import numpy as np
import pytest
import torch

from nbdev_trainer.data import Array, Boxes, Categories, Category, Data, Image, Mask, Number, Points, Text
from nbdev_trainer.data.color import recolor
from nbdev_trainer.data.kinds import kind_from
from nbdev_trainer.data.splits_by import split_by_folder
from nbdev_trainer.data.transforms import CenterCrop, RandomCrop, Resize


@pytest.mark.parametrize("above", ["", "/home/test/", "train/valid/"])
def test_class_named_like_a_part_stays_where_its_folder_is(above):
    """Of several folders with such a name the topmost below the common parent decides."""
    names = ["train/train/1", "train/test/2", "valid/train/3", "valid/test/4", "test/train/5", "TEST/val/6", "x/7"]
    split = split_by_folder()([f"{above}{name}.jpg" for name in names])
    parts = split.train, split.valid, split.test, split.unused
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("constant", [0.1, 0.3, 1234.567, 0.0])
def test_nearly_constant_column_is_not_blown_up(constant):
    """A thousand equal numbers have a deviation of 1e-17 from their rounded mean."""
    kind = Number(standardize=True)
    kind.fit([constant] * 1000)
    assert kind.std == [1.0] and abs(kind.encode(constant + 1) - 1) < 1e-6


def test_infinite_number_is_named_when_learning():
    with pytest.raises(ValueError, match="training item 2 has inf in column 0"):
        Number(standardize=True).fit([1.0, 2.0, float("inf")])


def test_given_numbers_are_kept_and_written_down():
    kind = Number(standardize=True, missing="mean", mean=[0.0], std=np.array([2], np.float32))
    kind.fit([10.0, 20.0])
    assert (kind.mean, kind.std, kind.fill) == ([0.0], [2.0], [0.0])
    assert kind_from(json.loads(json.dumps(kind.describe()))) == kind


def test_gaps_have_a_class_even_where_training_has_none():
    kind = Category(missing="unknown")
    kind.fit(["b", "a"])
    assert kind.vocab == ["a", "b", "unknown"] and kind.encode(None) == 2
    numbers = Category(missing="unknown")
    numbers.fit([2.0, float("nan"), torch.tensor(1.0), np.float32(2)])
    assert numbers.vocab == [1.0, 2.0, "unknown"] and numbers.encode(float("nan")) == 2


def test_labels_of_tensors_are_named_as_they_are_learnt():
    kind = Category()
    kind.fit([torch.tensor(0), torch.tensor(1)])
    assert kind.named(torch.tensor(1)) in kind.vocab and type(kind.named(np.int64(1))) is int


def test_vocabulary_of_numpy_becomes_a_list():
    kind = Category(vocab=np.array(["a", "b"]))
    assert kind.vocab == ["a", "b"] and json.loads(json.dumps(kind.describe()))["vocab"] == ["a", "b"]


@pytest.mark.parametrize("separator", [None, " "])
@pytest.mark.parametrize("gap", [None, float("nan")])
def test_missing_labels_are_refused_or_have_a_class(separator, gap):
    with pytest.raises(ValueError, match="the labels are missing"):
        Categories(separator=separator, vocab=["a"]).encode(gap)
    assert Categories(separator=separator, vocab=["a", "?"], missing="?").encode(gap).tolist() == [0, 1]


@pytest.mark.parametrize("kind, raw", [
    (Array(), np.zeros((2, 3), np.float32)), (Image(), np.zeros((4, 5, 3), np.uint8)),
    (Mask(), np.zeros((4, 5), np.uint8)), (Boxes(), np.array([[0, 0, 1, 1]], np.float32)),
    (Points(), np.zeros((2, 2), np.float32)), (Array(), torch.zeros(3)), (Image(), torch.zeros(4, 5, dtype=torch.uint8)),
])
def test_arrays_of_the_user_stay_as_they_are(kind, raw):
    """A value may be changed in place, and the array it came from may run backwards."""
    before = raw.copy() if isinstance(raw, np.ndarray) else raw.clone()
    value = kind.encode(raw)
    value[(0,) * value.ndim] = 7
    assert (raw == before).all()
    if isinstance(raw, np.ndarray) and not isinstance(kind, Boxes):
        assert kind.encode(raw[..., ::-1]).shape == value.shape


def test_values_of_a_mask_survive_json():
    kind = Mask(values={0: 0, 255: 1}, ignore_index=9)
    again = kind_from(json.loads(json.dumps(kind.describe())))
    value = again.encode(np.array([[0, 255]], np.uint8))
    assert value.dtype == torch.uint8 and again.decode(value).tolist() == [[0, 255]]
    assert again.decode(torch.tensor([[0, 9]])).tolist() == [[0, 9]]


def test_negative_class_is_found():
    with pytest.raises(ValueError, match="holds the class -1"):
        Mask(classes=["a", "b"]).encode(np.array([[-1, 0]]))
    assert Mask(classes=["a"], ignore_index=-100).encode(np.array([[-100, 0]])).tolist() == [[-100, 0]]


def test_broken_picture_is_named(tmp_path):
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"no picture")
    with pytest.raises(OSError) as caught:
        Image().encode(file)
    assert "broken.jpg" in "".join(caught.value.__notes__)


def test_one_of_several_transforms_applies_one():
    albumentations = pytest.importorskip("albumentations")
    from nbdev_trainer.data.adapters import Albumentations

    flips = [albumentations.HorizontalFlip(p=1), albumentations.VerticalFlip(p=1)]
    sample = {"image": torch.arange(12, dtype=torch.uint8).view(1, 3, 4)}
    result = Albumentations(albumentations.OneOf(flips, p=1))(sample, {"image": Image()}, np.random.default_rng(0))
    assert any(result["image"].equal(sample["image"].flip(way)) for way in (1, 2))


def split_at_dashes(text):
    return text.split("-")


def test_own_tokenizer_is_passed_again():
    """A description does not hold a function; the vocabulary that was learnt by it is taken over."""
    texts = ["a-b-c", "a-b"]
    data = Data(texts, {"x": Text(tokenizer=split_at_dashes)}, inputs="x")
    told = json.loads(json.dumps(data.describe()))
    assert told["fields"]["x"]["tokenizer"]["custom"].endswith("split_at_dashes")
    with pytest.raises(ValueError, match="no description holds; pass the kind with it again"):
        Data.from_description(told, texts, {"x": None})
    again = Data.from_description(told, texts, {"x": None}, kinds={"x": Text(tokenizer=split_at_dashes)})
    batches = [next(iter(one.loader(["c-b"]))).inputs.tolist() for one in (data, again)]
    assert batches[0] == batches[1] == [[6, 5]]


def test_special_words_in_texts_are_words():
    kind = Text(tokenizer="spaces")
    kind.fit(["<start> a <end>", "<pad> b <unknown>"])
    assert kind.vocab == ["<pad>", "<unknown>", "<start>", "<end>", "a", "b"]
    assert kind.encode("<pad> b <end>").tolist() == [1, 5, 1]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_ends_count_for_the_length_of_a_text(length):
    kind = Text(max_length=length, ends=True, vocab=["<pad>", "<unknown>", "<start>", "<end>"])
    assert len(kind.encode("a b c d e")) == length


@pytest.mark.parametrize("size", [np.int64(4), (np.int64(3), 4)])
def test_sizes_of_numpy_are_written_down(size):
    for kind in (Resize, RandomCrop, CenterCrop):
        json.dumps(kind(size).size)
        assert isinstance(kind(size).size, (int, tuple)) and not isinstance(kind(size).size, np.integer)


def test_grey_image_is_the_same_in_batches_of_any_size():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images, matrices = torch.rand(8, 1, 300, 300), torch.rand(8, 3, 4)
        together = recolor(images, matrices)
        alone = torch.cat([recolor(images[[i]], matrices[[i]]) for i in range(8)])
    finally:
        torch.set_num_threads(before)
    assert together.equal(alone)
