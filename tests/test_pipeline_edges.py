"""The data pipeline at its edges: odd names, odd numbers, and arrays that belong to somebody else."""

import numpy as np
import pytest
import torch

from nbdev_trainer.data.splits_by import split_by_folder


@pytest.mark.parametrize("above", ["", "/home/test/", "train/valid/"])
def test_class_named_like_a_part_stays_where_its_folder_is(above):
    """Of several folders with such a name the topmost below the common parent decides."""
    names = ["train/train/1", "train/test/2", "valid/train/3", "valid/test/4", "test/train/5", "TEST/val/6", "x/7"]
    split = split_by_folder()([f"{above}{name}.jpg" for name in names])
    parts = split.train, split.valid, split.test, split.unused
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6]]
