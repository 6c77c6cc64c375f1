"""The data pipeline: readers of files, kinds of fields, splits, transforms, and `Data`, which puts them together.

Each name is imported when it is first asked for: whoever trains on arrays should not wait for what reads pictures."""

import ast
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every public name once; `__getattr__` reads these lines, too
    from nbdev_trainer.data.adapters import Albumentations, Torchvision
    from nbdev_trainer.data.annotations import annotation_problems, read_coco, read_voc
    from nbdev_trainer.data.augment import BatchTransform, ColorJitter, Normalize, RandomErase, RandomNoise
    from nbdev_trainer.data.catalog import known_sets
    from nbdev_trainer.data.color import Blur, Erase, Grayscale, RandomColor
    from nbdev_trainer.data.datasets import fetch
    from nbdev_trainer.data.items import (
        Beside, FromCsv, FromName, content_hash, grandparent_name, image_files, parent_name, text_files,
    )
    from nbdev_trainer.data.kinds import Array, Categories, Category, Kind, Number, Numbers
    from nbdev_trainer.data.leaks import check_leaks
    from nbdev_trainer.data.lines import read_lines, read_parallel, read_text, read_ts
    from nbdev_trainer.data.pictures import Boxes, Image, Mask, Points
    from nbdev_trainer.data.pipeline import Data
    from nbdev_trainer.data.reading import Cache
    from nbdev_trainer.data.rows import read_rows
    from nbdev_trainer.data.samplers import Balanced, ByLength, Sampler, TokenBudget, Weighted
    from nbdev_trainer.data.samples import Transform
    from nbdev_trainer.data.sequence_transforms import (
        RandomSpan, SeriesNoise, SeriesScale, SeriesShift, TokenDropout, Truncate,
    )
    from nbdev_trainer.data.sequences import Audio, Series, Text, Tokens
    from nbdev_trainer.data.sound import read_wav
    from nbdev_trainer.data.sources import Apply, PerSample
    from nbdev_trainer.data.splits import Split, random_split
    from nbdev_trainer.data.splits_by import (
        grouped_split, k_fold, split_by_folder, split_by_predicate, split_by_time, split_by_value, stratified_split,
    )
    from nbdev_trainer.data.streams import ByEpoch, Combined, StreamLoader
    from nbdev_trainer.data.transforms import (
        Affine, CenterCrop, Flip, Perspective, RandomCrop, RandomResizedCrop, Resize, Rotate,
    )
    from nbdev_trainer.data.warp import RandomWarp


@cache
def modules_by_name() -> dict[str, str]:
    "Where each public name is defined, as the lines above say"
    tree = ast.parse(files(__name__).joinpath("__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    lines = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.asname or name.name: str(line.module) for line in lines for name in line.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name.startswith("__") or name not in modules_by_name():
        from nbdev_trainer.core.errors import did_you_mean

        known = () if name.startswith("__") else modules_by_name()
        raise AttributeError(f"nbdev_trainer.data has no {name!r}. {did_you_mean(name, known)}")
    found = getattr(import_module(modules_by_name()[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(modules_by_name())
