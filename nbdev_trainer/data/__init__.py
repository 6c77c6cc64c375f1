"""The data pipeline: readers of files, kinds of fields, splits, transforms, and `Data`, which puts them together."""

from nbdev_trainer.data.annotations import annotation_problems, read_coco, read_voc
from nbdev_trainer.data.augment import ColorJitter, Normalize, RandomErase, RandomNoise
from nbdev_trainer.data.color import Blur, Erase, Grayscale, RandomColor
from nbdev_trainer.data.items import (
    Beside, FromCsv, FromName, grandparent_name, image_files, parent_name, text_files,
)
from nbdev_trainer.data.kinds import Array, Categories, Category, Kind, Number, Numbers
from nbdev_trainer.data.pictures import Boxes, Image, Mask, Points
from nbdev_trainer.data.pipeline import Data
from nbdev_trainer.data.reading import Cache
from nbdev_trainer.data.samplers import Balanced, ByLength, Sampler, TokenBudget, Weighted
from nbdev_trainer.data.sequences import Audio, Series, Text, Tokens
from nbdev_trainer.data.sources import Apply, PerSample
from nbdev_trainer.data.splits import Split, random_split
