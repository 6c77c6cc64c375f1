"""Image, mask, boxes and points stay together, whatever a transform does to them."""

import dataclasses
import importlib
import inspect
import pkgutil
import random

import albumentations
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nbdev_trainer.data
from nbdev_trainer.core.seeding import hash64
from nbdev_trainer.data.adapters import Albumentations
from nbdev_trainer.data.augment import BatchTransform
from nbdev_trainer.data.color import PixelTransform
from nbdev_trainer.data.geometry import (
    about,
    compose,
    crop,
    perspective,
    resample,
    rotation,
    sampling_grid,
    scaling,
    shearing,
    transform_boxes,
    transform_points,
    translation,
    warp,
)
from nbdev_trainer.data.kinds import Category
from nbdev_trainer.data.pictures import Boxes, Image, Mask, Points
from nbdev_trainer.data.samples import Spatial
from nbdev_trainer.data.sequence_transforms import SequenceTransform
from nbdev_trainer.data.sequences import Series, Tokens
from nbdev_trainer.data.transforms import Affine, RandomCrop, Resize, Rotate
from nbdev_trainer.data.warp import RandomWarp, SpatialBatch


def concrete(base):
    """The classes of the library that derive from one and have none derived from them, in all modules of data."""
    for module in pkgutil.iter_modules(nbdev_trainer.data.__path__):
        importlib.import_module(f"nbdev_trainer.data.{module.name}")
    found, waiting = [], [base]
    while waiting:
        below = [one for one in waiting.pop().__subclasses__() if one.__module__.startswith("nbdev_trainer.")]
        waiting += below
        found += [one for one in below if not one.__subclasses__()]
    return sorted(set(found), key=lambda one: one.__name__)


SPATIAL, SPATIAL_BATCH = concrete(Spatial), concrete(SpatialBatch)
ITEM = SPATIAL + concrete(PixelTransform) + concrete(SequenceTransform)
BATCH = concrete(BatchTransform)

# What to draw for a setting, by its name. A new class joins by itself; a new name of a setting without a default needs a line here.
numbers = st.floats
DRAWN = {
    "size": st.tuples(st.integers(24, 44), st.integers(24, 44)),
    "method": st.sampled_from(["squish", "crop", "pad"]),
    "padding": st.integers(0, 20),
    "p": st.just(1.0),
    "vertical": st.booleans(),
    "flip": st.sampled_from([0.0, 1.0]),
    "degrees": st.one_of(numbers(0, 180), st.sampled_from([(90, 90), (180, 180), (-90, -90)])),
    "shear": numbers(0, 20),
    "translate": numbers(0, 0.3),
    "shift": numbers(0, 0.3),
    "amount": numbers(0, 0.5),
    "perspective": numbers(0, 0.5),
    "rotate": numbers(0, 180),
    "zoom": numbers(0, 0.4),
    "length": st.integers(1, 9),
    "mean": st.just([0.4] * 3),
    "std": st.just([0.2] * 3),
}
ONE = {"RandomResizedCrop.scale": st.just((0.3, 1.0)), "Affine.scale": numbers(0, 0.4),
       "Affine.translate": numbers(0.01, 0.5)}  # it refuses to change nothing
ONE |= {"RandomWarp.vertical": st.sampled_from([0.0, 1.0])}


@st.composite
def made(draw, kind, **fixed):
    """A transform of a class with settings drawn at random."""
    chosen = dict(fixed)
    for name, parameter in inspect.signature(kind).parameters.items():
        strategy = ONE.get(f"{kind.__name__}.{name}", DRAWN.get(name) if name != "scale" else None)
        if name in chosen or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if strategy is not None:
            chosen[name] = draw(strategy)
        assert strategy is not None or parameter.default is not parameter.empty, f"DRAWN has no {name!r}"
    return kind(**chosen)


@st.composite
def scenes(draw, height=None, width=None):
    """A picture with two rectangles and a dot: the image and the mask show what boxes and points say."""
    height, width = height or draw(st.integers(44, 80)), width or draw(st.integers(44, 80))
    image, mask = (
        torch.zeros(4, height, width, dtype=torch.uint8),
        torch.zeros(height, width, dtype=torch.uint8),
    )
    boxes, points = [], []
    for number, low in enumerate((0, width // 2)):
        x1, y1 = draw(st.integers(low, low + 6)), draw(st.integers(0, height - 20))
        x2, y2 = draw(st.integers(x1 + 12, low + width // 2)), draw(st.integers(y1 + 12, height))
        image[number, y1:y2, x1:x2], mask[y1:y2, x1:x2] = 255, number + 1
        boxes.append([x1, y1, x2, y2])
        points += [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    x, y = draw(st.integers(4, width - 4)), draw(st.integers(4, height - 4))
    image[2, y - 4 : y + 4, x - 4 : x + 4] = 255
    image[3] = 255  # inside of the picture
    points += [[x, y], [x - 4, y - 4], [x + 4, y - 4], [x + 4, y + 4], [x - 4, y + 4]]
    return {
        "image": image,
        "mask": mask,
        "boxes": torch.tensor(boxes).float(),
        "points": torch.tensor(points).float(),
        "labels": torch.tensor([0, 1]),
    }


KINDS = {
    "image": Image(channels=4),
    "mask": Mask(ignore_index=255),
    "boxes": Boxes(),
    "points": Points(),
    "labels": Category(per="boxes", vocab=["first", "second"]),
    "wave": Series(),
    "text": Tokens(),
}


def filled(shown, threshold, size=5):
    """Where all pixels around are above a threshold."""
    around = torch.nn.functional.unfold(shown[None, None].float(), size, padding=size // 2)
    return (around > threshold).all(1).view(shown.shape)


def raise_unless_together(sample):
    """What the image shows, the mask, the boxes and the points say."""
    image, mask, points = (
        sample["image"].float() / (1 if sample["image"].is_floating_point() else 255),
        sample["mask"],
        sample["points"],
    )
    assert image.shape[1:] == mask.shape
    height, width = mask.shape
    margin = torch.zeros(height, width, dtype=torch.bool)
    margin[3:-3, 3:-3] = True  # `filled` sees nothing beyond the edges
    for number in (0, 1):
        shown, gone = filled(image[number], 0.8) & margin, filled(1 - image[number], 0.8) & margin
        assert (mask[shown] == number + 1).all() and (mask[gone] != number + 1).all()
    assert (mask[filled(image[3], 0.8) & margin] != 255).all() and (
        mask[filled(1 - image[3], 0.8) & margin] == 255
    ).all()
    left = dict(zip(sample["labels"].tolist(), sample["boxes"]))
    assert len(left) == len(sample["boxes"]) == len(sample["labels"])
    for number in (0, 1):
        corners = points[4 * number : 4 * number + 4]
        rows, columns = (image[number] > 0.6).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        assert number in left, "a box was dropped whose inside can be seen"
        told = left[number]
        assert (told[:2] <= seen[:2] + 1.5).all() and (told[2:] >= seen[2:] - 1.5).all(), (told, seen)
        assert (told >= 0).all() and (told <= torch.tensor([width, height, width, height])).all()
        if corners.isfinite().all():  # nothing was cut off, so box and rectangle end together
            assert (told - seen).abs().max() <= 2, (told, seen)
    if points[8:].isfinite().all():  # the whole dot can be seen
        total = image[2].sum()
        x = (image[2].sum(0) * (torch.arange(width) + 0.5)).sum() / total
        y = (image[2].sum(1) * (torch.arange(height) + 0.5)).sum() / total
        assert (torch.stack([x, y]) - points[8]).abs().max() < 1, ((x, y), points[8])


@pytest.mark.parametrize("kind", SPATIAL, ids=lambda kind: kind.__name__)
def test_everything_in_a_picture_moves_together(kind):
    @settings(max_examples=40, deadline=None)
    @given(made(kind), scenes(), st.integers(0, 2**32))
    def check(transform, sample, seed):
        raise_unless_together(transform(sample, KINDS, np.random.default_rng(seed)))

    check()


@pytest.mark.parametrize("fill", ["border", "reflection"])
@pytest.mark.parametrize("kind", [Resize, RandomCrop, Rotate, Affine], ids=lambda kind: kind.__name__)
def test_image_and_mask_go_on_alike_beyond_the_edges(kind, fill):
    @settings(max_examples=15, deadline=None)
    @given(made(kind, fill=fill), scenes(), st.integers(0, 2**32))
    def check(transform, sample, seed):
        moved = transform(
            {name: sample[name] for name in ("image", "mask")}, KINDS, np.random.default_rng(seed)
        )
        assert set(moved["mask"].unique().tolist()) <= {0, 1, 2}
        for number in (0, 1):
            shown = filled(moved["image"][number].float() / 255, 0.8)
            assert (moved["mask"][shown] == number + 1).all()

    check()


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "ragged"])
@pytest.mark.parametrize("kind", SPATIAL_BATCH, ids=lambda kind: kind.__name__)
def test_everything_in_the_pictures_of_a_batch_moves_together(kind, stacked):
    same = scenes(50, 64) if stacked else scenes()

    @settings(max_examples=25, deadline=None)
    @given(made(kind), st.lists(same, min_size=1, max_size=3), st.integers(0, 2**32))
    def check(transform, samples, seed):
        fields = {name: [one[name] for one in samples] for name in samples[0]}
        fields = {name: KINDS[name].arrive(value) for name, value in fields.items()}
        if stacked:
            fields |= {name: torch.stack(fields[name]) for name in ("image", "mask", "points")}
        moved = transform(fields, KINDS, hash64(seed, 0, np.arange(len(samples))))
        for i in range(len(samples)):
            raise_unless_together({name: value[i] for name, value in moved.items()})

    check()


THEIRS = {
    "flips": [albumentations.HorizontalFlip(), albumentations.VerticalFlip()],
    "affine": [
        albumentations.Affine(rotate=(-90, 90), scale=(0.7, 1.3), shear=(-10, 10), p=1, fill_mask=255)
    ],
    "perspective": [albumentations.Perspective(scale=(0.05, 0.2), p=1, fill_mask=255)],
    "crop": [albumentations.RandomResizedCrop((40, 50), scale=(0.4, 1.0), p=1)],
    "quarter turns": [albumentations.RandomRotate90(p=1), albumentations.Transpose(p=0.5)],
}


@pytest.mark.parametrize("name", THEIRS)
def test_everything_moves_together_under_transforms_of_albumentations(name):
    transform = Albumentations(THEIRS[name])

    @settings(max_examples=15, deadline=None)
    @given(scenes(), st.integers(0, 2**32))
    def check(sample, seed):
        raise_unless_together(transform(sample, KINDS, np.random.default_rng(seed)))

    check()


@given(st.data(), scenes())
@settings(max_examples=10, deadline=None)
def test_a_mistake_of_a_few_pixels_would_be_found(data, sample):
    transform = data.draw(made(Affine))
    moved = transform(sample, KINDS, np.random.default_rng(0))
    raise_unless_together(moved)
    wrong = {
        "boxes": moved["boxes"] + 3,
        "points": moved["points"] + torch.tensor([3.0, 0]),
        "mask": moved["mask"].roll(6, 1),
    }
    whole = moved["points"].isfinite().all() and len(moved["boxes"])
    for name, value in wrong.items():
        if whole and not (name == "mask" and value.equal(moved["mask"])):
            with pytest.raises(AssertionError):
                raise_unless_together(moved | {name: value})


def given_to(kind):
    """A sample for a class of transforms, with fields that it knows."""
    torch.manual_seed(0)
    if issubclass(kind, SequenceTransform):
        return {"wave": torch.randn(2, 50), "text": torch.arange(30)}
    boxes = torch.tensor([[5.0, 6, 30, 30], [28, 20, 60, 40]])
    return {
        "image": torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (48, 64), dtype=torch.uint8),
        "boxes": boxes,
        "points": boxes[:, :2].clone(),
        "labels": torch.tensor([0, 1]),
    }


def equal(one, other):
    same = [torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one]
    return one.keys() == other.keys() and all(same)


def usual(kind):
    """A transform with fixed settings."""
    fixed = {"size": (30, 40), "degrees": 30, "length": 12, "mean": [0.4] * 3, "std": [0.2] * 3}
    parameters = inspect.signature(kind).parameters
    needed = [name for name, one in parameters.items() if one.default is one.empty or (name == "degrees")]
    return kind(**{name: fixed[name] for name in needed})


@pytest.mark.parametrize("kind", ITEM, ids=lambda kind: kind.__name__)
def test_a_transform_depends_on_its_generator_alone_and_changes_nothing(kind):
    transform, sample = usual(kind), given_to(kind)
    before = {name: value.clone() for name, value in sample.items()}
    globals_before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    results = [transform(sample, KINDS, np.random.default_rng(seed)) for seed in range(8)]
    again = [transform(sample, KINDS, np.random.default_rng(seed)) for seed in range(8)]
    assert all(equal(one, other) for one, other in zip(results, again))
    assert equal(sample, before)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == globals_before[:2]
    assert torch.equal(torch.get_rng_state(), globals_before[2])
    if transform.random_draws and kind.__name__ != "Grayscale":  # whose p is 1, so all are alike
        assert not all(equal(one, results[0]) for one in results)
    if not transform.random_draws:
        assert equal(transform(sample, KINDS, None), results[0])


@pytest.mark.parametrize(
    "kind",
    [kind for kind in ITEM if "p" in inspect.signature(kind).parameters],
    ids=lambda kind: kind.__name__,
)
def test_a_transform_costs_the_same_draws_whether_it_happens_or_not(kind):
    if kind.__name__ == "TokenDropout":
        return  # p is a share of tokens there
    states = []
    for p in (0.0, 1.0):
        draws = np.random.default_rng(3)
        dataclasses.replace(usual(kind), p=p)(given_to(kind), KINDS, draws)
        states.append(draws.bit_generator.state)
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", BATCH, ids=lambda kind: kind.__name__)
def test_a_sample_is_treated_alike_in_any_batch(kind):
    transform, keys = usual(kind), hash64(5, 0, np.arange(5))
    images = torch.rand(5, 3, 32, 40)
    fields = {"image": images}
    together = transform(fields, KINDS, keys)["image"]
    halves = [
        transform({"image": images[part]}, KINDS, keys[part])["image"] for part in (slice(0, 2), slice(2, 5))
    ]
    listed = transform({"image": list(images)}, KINDS, keys)["image"]
    backwards = transform({"image": images.flip(0)}, KINDS, keys[::-1].copy())["image"].flip(0)
    for other in (torch.cat(halves), torch.stack(listed), backwards):
        torch.testing.assert_close(together, other, atol=1e-4, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(transform(fields, KINDS, keys)["image"], together)
    assert fields["image"] is images


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BATCH, ids=lambda kind: kind.__name__)
def test_a_batch_is_treated_alike_on_every_device(kind):
    transform, keys, sample = usual(kind), hash64(5, 0, np.arange(4)), given_to(kind)
    fields = {
        "image": torch.rand(4, 3, 48, 64),
        "mask": sample["mask"].long().expand(4, -1, -1),
        "boxes": [sample["boxes"]] * 4,
        "labels": [sample["labels"]] * 4,
    }
    there = {
        name: [one.cuda() for one in value] if isinstance(value, list) else value.cuda()
        for name, value in fields.items()
    }
    here, there = transform(fields, KINDS, keys), transform(there, KINDS, keys)
    torch.testing.assert_close(there["image"].cpu(), here["image"], atol=2e-3, rtol=0)
    assert (there["mask"].cpu() != here["mask"]).float().mean() < 1e-3
    for one, other in zip(there["boxes"], here["boxes"]):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=0)


finite = st.floats(-200, 200)
matrices = st.one_of(
    st.builds(translation, finite, finite),
    st.builds(rotation, st.floats(-720, 720)),
    st.builds(scaling, st.floats(0.2, 5), st.floats(0.2, 5)),
    st.builds(shearing, st.floats(-40, 40), st.just(0.0)),
)


@given(
    st.lists(matrices, min_size=1, max_size=4), st.lists(st.tuples(finite, finite), min_size=1, max_size=5)
)
def test_steps_and_their_inverse_lead_back(steps, points):
    matrix, points = compose(*steps), np.array(points)
    there = points
    for step in steps:
        there = transform_points(there, step)
    np.testing.assert_allclose(transform_points(points, matrix), there, atol=1e-6 * (1 + np.abs(there).max()))
    np.testing.assert_allclose(transform_points(there, np.linalg.inv(matrix)), points, atol=1e-4)


@given(st.lists(st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3)), min_size=4, max_size=4))
def test_a_perspective_takes_corners_where_they_should_go(moves):
    corners = np.array([[0, 0], [90, 0], [90, 60], [0, 60]], float)
    target = corners + np.array(moves) * 60
    np.testing.assert_allclose(transform_points(corners, perspective(corners, target)), target, atol=1e-6)


@given(
    st.integers(-30, 30),
    st.integers(-30, 30),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 7.0, "border", "reflection"]),
)
@settings(deadline=None)
def test_a_crop_is_what_sampling_gives(top, left, height, width, fill):
    image = torch.arange(5 * 9.0).view(1, 5, 9) * 3
    grid = sampling_grid(translation(-left, -top)[None], (5, 9), (height, width), torch.device("cpu"))
    expected = warp(image[None], grid, fill=fill)[0]
    if isinstance(fill, str):  # torch mirrors a far place with some error
        torch.testing.assert_close(crop(image, top, left, (height, width), fill), expected, atol=2e-3, rtol=0)
    else:
        torch.testing.assert_close(crop(image, top, left, (height, width), fill), expected, atol=1e-3, rtol=0)


@given(scenes(), st.floats(0.1, 1.0))
@settings(max_examples=20, deadline=None)
def test_the_share_of_a_box_that_must_be_seen_is_kept_to(sample, min_visible):
    boxes, matrix = sample["boxes"].double().numpy(), translation(-20, 7)
    moved, keep = transform_boxes(boxes, matrix, (40, 40), min_visible)
    whole = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    assert keep.tolist() == ((left > 0) & (left >= min_visible * whole)).tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int64])
def test_masks_of_any_type_keep_their_classes(dtype):
    mask = torch.randint(0, 200, (40, 50)).to(dtype)
    for matrix in (
        rotation(0),
        about(rotation(33), 25, 20),
        scaling(0.4),
        compose(rotation(90), translation(0, 50)),
    ):
        moved = resample(mask, matrix, (30, 30), fill=201, nearest=True)
        assert moved.dtype == dtype and set(moved.unique().tolist()) <= {*mask.unique().tolist(), 201}


def test_boxes_without_an_entry_for_each_are_refused_by_item_and_by_batch():
    sample = given_to(Resize) | {"labels": torch.tensor([0])}
    with pytest.raises(
        ValueError, match="'labels' is int64 .* and there are 2 'boxes'; expected an entry for each"
    ):
        RandomCrop(10)(sample, KINDS, np.random.default_rng(1))
    batch = {"image": torch.rand(1, 3, 48, 64), "boxes": [sample["boxes"]], "labels": [sample["labels"]]}
    with pytest.raises(ValueError, match="'labels' has 1 entries in this batch, and there are 2 'boxes'"):
        RandomWarp()(batch, KINDS, hash64(0, 0, np.arange(1)))
