"""Readers on real data sets, which all have their traps, and what every split promises whatever the items."""

import csv
import gzip
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdev_trainer.data.annotations import Annotated, annotation_problems, read_coco, read_voc
from nbdev_trainer.data.archives import unpack
from nbdev_trainer.data.items import (
    Beside,
    FromCsv,
    FromName,
    content_hash,
    find_files,
    grandparent_name,
    image_files,
    parent_name,
    read_all,
)
from nbdev_trainer.data.leaks import check_leaks, find_leaks
from nbdev_trainer.data.lines import read_lines, read_parallel, read_ts
from nbdev_trainer.data.rows import Rows, Texts, read_rows
from nbdev_trainer.data.sound import read_wav
from nbdev_trainer.data.splits import Split, random_split, stable_text
from nbdev_trainer.data.splits_by import (
    grouped_split,
    k_fold,
    split_by_folder,
    split_by_predicate,
    split_by_time,
    split_by_value,
    stratified_split,
)
from nbdev_trainer.store.files import write_json

FOLDER = os.environ.get("NBDEV_TRAINER_DATA", "")


def data_set(name):
    """The folder of a data set, or a skipped test with the reason."""
    if not FOLDER:
        pytest.skip("NBDEV_TRAINER_DATA does not name a folder with data sets")
    folder = Path(FOLDER) / name
    if not folder.is_dir():
        pytest.skip(f"the folder named by NBDEV_TRAINER_DATA has no {name}")
    return folder


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """A function that unpacks the archive of a data set, once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            archive = next(data_set(name).glob("*.zip"))  # may skip the test
            folders[name] = tmp_path_factory.mktemp(name)
            unpack(archive, folders[name])
        return folders[name]

    return folder_of


FEW = settings(max_examples=60, deadline=None)


# Images


def test_photos_in_folders_by_class_and_part(unpacked):
    items = image_files(unpacked("hymenoptera"))
    split = split_by_folder()(items)
    assert Counter((grandparent_name(item), parent_name(item)) for item in items) == {
        ("train", "ants"): 47,
        ("train", "bees"): 37,
        ("val", "ants"): 23,
        ("val", "bees"): 22,
    }
    assert (len(split.train), len(split.valid), len(split.test), len(split.unused)) == (84, 45, 0, 0)
    assert "47 (56.0%)" in split.report(items, by=parent_name)
    check_leaks(items, split)


def test_masks_beside_images(unpacked):
    items = image_files(unpacked("camvid"), extensions=".jpg")
    split = split_by_folder()(items)
    assert [len(ids) for ids in split.parts().values()] == [92, 26, 24, 0]
    masks = read_all(items, Beside("../{parent}annot/{stem}.png"))
    assert all(mask.stem == item.stem and mask.suffix == ".png" for mask, item in zip(masks, items))
    with pytest.raises(ValueError, match="100 of 100 items cannot be read: 4 problems"):
        read_all(items, Beside("../{parent}annot/{stem}.jpg"))


def test_the_same_photo_twice_is_found_and_kept_together(unpacked):
    folder = unpacked("raccoon_voc")
    items = read_voc(folder / "images", folder / "annotations")
    numbers = [int(FromName(r"(\d+)")(item)) for item in items]
    split = split_by_predicate(lambda item: item.path.stem in ("raccoon-65", "raccoon-83"))(items)
    with pytest.raises(ValueError, match="2 problems") as caught:
        check_leaks(items, split)
    for name in ("raccoon-65.jpg", "raccoon-98.jpg", "raccoon-83.jpg", "raccoon-120.jpg"):
        assert name in str(caught.value)
    for seed in range(20):
        apart = grouped_split(by=content_hash, valid=0.2, test=0.2, seed=seed)(items)
        assert find_leaks(items, apart) == []
        assert (len(apart.valid), len(apart.test)) == (29, 29)
        sides = {numbers[i]: part for part, ids in apart.parts().items() for i in ids}
        assert sides[65] == sides[98] and sides[83] == sides[120]


def test_boxes_of_photos_of_different_sizes(unpacked):
    folder = unpacked("raccoon_voc")
    items = read_voc(folder / "images", folder / "annotations")
    assert (len(items), sum(len(item.boxes) for item in items)) == (145, 153)
    assert {label for item in items for label in item.labels} == {"raccoon"}
    assert len({item.size for item in items}) == 95
    assert all(item.path.is_file() for item in items)


def test_annotations_are_true_about_the_size_of_images(unpacked):
    image = pytest.importorskip("PIL.Image")
    folder = unpacked("raccoon_voc")
    modes = Counter()
    for item in read_voc(folder / "images", folder / "annotations"):
        with image.open(item.path) as picture:
            assert picture.size == item.size
            modes[picture.mode] += 1
    assert modes["L"] == 3  # stored as grey: a kind must make them RGB


def test_boxes_without_area_stop_the_reader_or_are_dropped(unpacked):
    folder = unpacked("bccd_voc") / "BCCD"
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    with pytest.raises(ValueError, match="2 problems") as caught:
        read_voc(images, annotations)
    assert "'BloodImage_00338.jpg', box" in str(caught.value) and "00343" in str(caught.value)
    items = read_voc(images, annotations, on_bad_box="drop")
    everything = read_voc(images, annotations, on_bad_box="keep")
    assert (len(items), sum(len(item.boxes) for item in items)) == (364, 4886)
    assert len(annotation_problems(everything)) == 2
    assert Counter(label for item in everything for label in item.labels) == {
        "RBC": 4155,
        "WBC": 372,
        "Platelets": 361,
    }
    parts = {
        part: read_voc(images, annotations, names=folder / f"ImageSets/Main/{part}.txt", on_bad_box="drop")
        for part in ("train", "val", "test")
    }
    assert {part: len(some) for part, some in parts.items()} == {"train": 205, "val": 87, "test": 72}
    assert sorted(item.path for some in parts.values() for item in some) == [item.path for item in items]


def test_a_coco_file_made_of_a_voc_set_gives_the_same_items(unpacked, tmp_path):
    folder = unpacked("bccd_voc") / "BCCD"
    items = read_voc(folder / "JPEGImages", folder / "Annotations", on_bad_box="drop")
    names = ["RBC", "WBC", "Platelets"]
    boxes = [
        {"image_id": i, "category_id": names.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for i, item in enumerate(items)
        for (x1, y1, x2, y2), label in zip(item.boxes, item.labels)
    ]
    images = [
        {"id": i, "file_name": item.path.name, "width": item.size[0], "height": item.size[1]}
        for i, item in enumerate(items)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    write_json(tmp_path / "coco.json", {"images": images, "annotations": boxes, "categories": categories})
    assert read_coco(folder / "JPEGImages", tmp_path / "coco.json") == items


def test_an_annotation_with_entities_is_refused_before_they_unfold(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    (tmp_path / "xml").mkdir()
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    text = f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><annotation>&e11;</annotation>'
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "xml/a.xml").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match="a.xml' cannot be read as XML"):
            read_voc(tmp_path / "images", tmp_path / "xml")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    text = f'<!DOCTYPE a [<!ENTITY s SYSTEM "{secret.as_uri()}">]><annotation>&s;</annotation>'
    (tmp_path / "xml/a.xml").write_text(text)
    with pytest.raises(ValueError, match="it has a document type"):
        read_voc(tmp_path / "images", tmp_path / "xml")


# Tables


def test_census_with_question_marks_spaces_and_full_stops():
    folder = data_set("adult")
    names = (
        "age workclass fnlwgt education education-num marital-status occupation relationship race sex "
        "capital-gain capital-loss hours-per-week native-country income"
    ).split()
    files = folder / "adult.data.gz", folder / "adult.test.gz"
    rows = read_rows(*files, names=names, separator=",", missing=["?"], file_column="file")
    assert len(rows) == 32_561 + 16_281
    gaps = [column.missing for column in rows.table.values() if isinstance(column, Texts)]
    assert sum(sum(gap[:32_561]) for gap in gaps) == 4262
    assert sum(sum(gap[32_561:]) for gap in gaps) == 2203
    assert rows[0]["workclass"] == "State-gov" and rows[0]["age"] == 39
    assert Counter(rows.column("income")) == {"<=50K": 24_720, ">50K": 7841, "<=50K.": 12_435, ">50K.": 3846}
    split = split_by_value("file", valid="adult.test.gz")(rows)
    assert (split.train[-1], split.valid[0], len(split.valid)) == (32_560, 32_561, 16_281)

    def income(row):
        return row["income"].rstrip(".")

    balanced = stratified_split(by=income, valid=0.2)(rows)
    assert len(balanced.valid) == 9768
    assert sum(income(rows[i]) == ">50K" for i in balanced.valid.tolist()) == 2337  # 0.2 of 11,687


def test_passengers_with_gaps():
    rows = read_rows(data_set("titanic") / "titanic_kaggle_train.csv")
    columns = {name: rows.column(name) for name in rows.columns}
    gaps = {name: sum(one is None or one != one for one in column) for name, column in columns.items()}
    assert {name: n for name, n in gaps.items() if n} == {"Age": 177, "Cabin": 687, "Embarked": 2}
    assert (len(rows), type(rows[0]["Survived"]), rows[0]["Name"]) == (891, int, "Braund, Mr. Owen Harris")
    assert Counter(rows.column("Survived").tolist()) == {0: 549, 1: 342}


def test_houses_keep_their_missing_numbers():
    rows = read_rows(data_set("california_housing") / "housing.csv.gz")
    assert len(rows) == 20_640 and np.isnan(rows.column("total_bedrooms")).sum() == 207
    split = stratified_split(by="ocean_proximity", valid=0.2)(rows)
    held_out = Counter(rows[i]["ocean_proximity"] for i in split.valid.tolist())
    assert held_out["ISLAND"] == 1  # of five


def test_reviews_with_line_feeds_and_a_column_for_the_split():
    rows = read_rows(data_set("imdb_sample") / "texts.csv.gz")
    split = split_by_value("is_valid", valid=True)(rows)
    assert (len(split.train), len(split.valid)) == (800, 200)
    assert Counter(rows[i]["label"] for i in split.train.tolist()) == {"negative": 417, "positive": 383}
    with pytest.raises(ValueError, match="100 items cannot be read: 4 problems\n- item 0: KeyError"):
        split_by_value("is_vaild", valid=True)(rows)


def test_sentences_with_lonely_quotes_lose_no_line():
    folder = data_set("sst2")
    counts = {}
    for part in ("train", "dev", "test"):
        rows = read_rows(folder / f"{part}.tsv.gz", names=["text", "label"])
        counts[part] = len(rows), sum(rows.column("label").tolist())
        lines = [line.split("\t") for line in read_lines(folder / f"{part}.tsv.gz")]
        assert [[row["text"], str(row["label"])] for row in rows] == lines
    assert counts == {"train": (6920, 3610), "dev": (872, 444), "test": (1821, 909)}


def test_rows_agree_with_pythons_csv_module():
    path = data_set("titanic") / "titanic_kaggle_train.csv"
    with open(path, newline="") as file:
        expected = list(csv.DictReader(file))
    names = list(expected[0])
    rows = read_rows(path, as_text=names, missing=[])
    assert [dict(row) for row in rows] == expected


def test_parquet_gives_the_rows_of_the_csv_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = data_set("california_housing") / "housing.csv.gz"
    pandas.read_csv(path).to_parquet(tmp_path / "houses.parquet")
    a, b = read_rows(path), read_rows(tmp_path / "houses.parquet")
    assert a.columns == b.columns and len(a) == len(b)
    for name in a.columns:
        np.testing.assert_array_equal(np.array(a.column(name)), np.array(b.column(name)))


def test_texts_take_little_more_than_their_letters():
    values = [f"a text of some length, number {i}" for i in range(20_000)]
    texts = Texts(values)
    letters = sum(map(len, values))
    assert len(pickle.dumps(Rows({"text": texts}))) < letters + 10 * len(values)
    assert list(texts) == values and texts[::1000] == values[::1000]


@FEW
@given(st.lists(st.none() | st.text()), st.data())
def test_texts_are_the_list_they_were_made_of(values, data):
    texts = Texts(values)
    assert list(texts) == values and len(texts) == len(values)
    place = data.draw(st.slices(len(values)))
    assert texts[place] == values[place]


def test_a_missing_package_is_named_with_its_extra():
    program = (
        "import sys; sys.modules.update(pandas=None, soundfile=None)\n"
        "from nbdev_trainer.data.rows import read_rows\n"
        "from nbdev_trainer.data.sound import read_wav\n"
        "for call in (lambda: read_rows('x.csv'), lambda: read_wav('x.wav')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    told = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=120)
    assert "nbdev_trainer[tabular]" in told and "nbdev_trainer[audio]" in told


# Lines, series, sound


def test_translations_line_up():
    folder = data_set("multi30k")
    for part, n in (("train", 29_000), ("val", 1014)):
        triples = read_parallel(*(folder / f"{part}.{language}.gz" for language in ("en", "de", "fr")))
        assert len(triples) == n and all(all(texts) for texts in triples)
    with pytest.raises(ValueError, match="29000.*1014"):
        read_parallel(folder / "train.en.gz", folder / "val.de.gz")


def test_characters_that_end_lines_elsewhere_do_not_here(tmp_path):
    text = "one\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029end\rof one\ntwo"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_lines(tmp_path / "a.txt.gz") == text.split("\n")


@pytest.mark.parametrize(
    ("name", "sizes", "channels", "lengths", "classes"),
    [
        ("GunPoint", (50, 150), 1, {150}, 2),
        ("ItalyPowerDemand", (67, 1029), 1, {24}, 2),
        ("BasicMotions", (40, 40), 6, {100}, 4),
        ("JapaneseVowels", (270, 370), 12, set(range(7, 30)), 9),
    ],
)
def test_time_series_of_the_archive(name, sizes, channels, lengths, classes):
    folder = data_set("time_series")
    parts = [read_ts(folder / f"{name}_{part}.ts.gz") for part in ("TRAIN", "TEST")]
    cases = parts[0] + parts[1]
    assert tuple(map(len, parts)) == sizes
    assert {case.values.shape[0] for case in cases} == {channels}
    found = {case.values.shape[1] for case in cases}
    assert found <= lengths and (min(found), max(found)) == (min(lengths), max(lengths))
    assert len({case.label for case in cases}) == classes
    assert all(case.values.dtype == np.float32 and np.isfinite(case.values).all() for case in cases)


def test_spoken_digits(unpacked):
    items = find_files(unpacked("free_spoken_digits"), extensions=".wav")
    assert Counter(read_all(items, FromName(r"^(\d)_"))) == dict.fromkeys("0123456789", 90)
    sounds = [read_wav(item) for item in items[::50]]
    assert {(samples.shape[0], rate) for samples, rate in sounds} == {(1, 8000)}
    assert all(0 < abs(samples).max() <= 1 for samples, _ in sounds)
    official = split_by_predicate(lambda path: int(FromName(r"_(\d+)\.wav")(path)) < 5)(items)
    assert (len(official.train), len(official.valid)) == (600, 300)
    speaker = FromName(r"_([a-z]+)_")
    split = grouped_split(by=speaker, valid=1 / 6)(items)
    assert len(split.valid) == 150 and find_leaks(items, split, by=speaker) == []


def test_sound_agrees_with_pythons_wave_module(unpacked):
    import wave

    path = find_files(unpacked("free_spoken_digits"), extensions=".wav")[0]
    with wave.open(str(path)) as file:
        expected = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    np.testing.assert_array_equal(read_wav(path)[0][0], expected)


# Files


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_once(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("set/a/1.png", "elsewhere/2.png"):
        (tmp_path / name).touch()
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set", target_is_directory=True)
    assert [path.name for path in image_files(tmp_path / "set")] == ["1.png", "2.png"]


def test_files_come_in_one_order_whatever_the_system_does(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/10.png", "a.png", "B.png", "a/x.png", "a-b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    walk = os.walk

    def backwards(*values, **options):
        for directory, below, names in walk(*values, **options):
            below.reverse()
            yield directory, below, names[::-1]

    expected = image_files(tmp_path)
    monkeypatch.setattr(os, "walk", backwards)
    assert image_files(tmp_path) == expected
    names = [path.relative_to(tmp_path).as_posix() for path in expected]
    assert names == sorted(names)


def test_labels_by_file_name_stem_and_path(tmp_path):
    (tmp_path / "labels.tsv").write_text("file\tlabel\nx\\a.png\tA\nb\tB\nc.png\t\n")
    reader = pickle.loads(pickle.dumps(FromCsv(tmp_path / "labels.tsv", "file", "label")))
    assert [reader(f"root/x/{name}.png") for name in "abc"] == ["A", "B", ""]
    with pytest.raises(ValueError, match="has no line for"):
        reader("root/y/a.png")


# Splits

LABELS = st.lists(st.sampled_from("aaaabbc"), min_size=4, max_size=80)
SHARES = st.sampled_from([(0.2, 0), (0.2, 0.2), (0.5, 0.25), (1, 1), (2, 0), (0.1, 0)])
SEEDS = st.integers(0, 2**63 - 1)


def positions(split):
    return {part: ids.tolist() for part, ids in split.parts().items()}


def split_or_none(splitter, items):
    """The split, or None where the shares do not fit the number of items."""
    try:
        return splitter(items)
    except ValueError as error:
        assert any(text in str(error) for text in ("Expected", "too large", "stay together"))
        return None


def check_whole(split, n):
    everything = [i for ids in positions(split).values() for i in ids]
    assert sorted(everything) == list(range(n))
    assert len(split.train) and len(split.valid)
    assert all(ids == sorted(ids) for ids in positions(split).values())


@FEW
@given(LABELS, SHARES, SEEDS)
def test_every_split_is_disjoint_complete_and_repeatable(labels, shares, seed):
    valid, test = shares
    items = [{"label": label, "number": i} for i, label in enumerate(labels)]
    makers = [
        lambda: random_split(valid=valid, test=test, seed=seed),
        lambda: random_split(valid=valid, test=test, seed=seed, key="number"),
        lambda: stratified_split(by="label", valid=valid, test=test, seed=seed),
        lambda: grouped_split(by="label", valid=valid, test=test, seed=seed),
        lambda: split_by_time(by="number", valid=valid, test=test),
    ]
    for make in makers:
        split = split_or_none(make(), items)
        if split is not None:
            check_whole(split, len(items))
            assert positions(split) == positions(make()(items))


@FEW
@given(LABELS, SHARES, SEEDS)
def test_strata_are_within_one_sample_of_their_share(labels, shares, seed):
    split = split_or_none(stratified_split(by=str, valid=shares[0], test=shares[1], seed=seed), labels)
    if split is None:
        return
    for ids in (split.valid, split.test):
        counts = Counter(labels[i] for i in ids.tolist())
        for label, size in Counter(labels).items():
            assert abs(counts[label] - size * len(ids) / len(labels)) < 1
    sizes = Counter(labels)
    if shares in ((0.2, 0), (0.1, 0)) and max(sizes.values()) > 1:
        assert all(labels.index(label) in split.train.tolist() for label, size in sizes.items() if size == 1)


@FEW
@given(st.lists(st.integers(0, 9), min_size=4, max_size=60), SHARES, SEEDS, st.randoms())
def test_groups_stay_whole_in_any_order_of_items(groups, shares, seed, random):
    splitter = grouped_split(by=0, valid=shares[0], test=shares[1], seed=seed)
    items = [(group, i) for i, group in enumerate(groups)]
    split = split_or_none(splitter, items)
    mixed = random.sample(items, len(items))
    if split is None:
        return
    assert find_leaks(items, split, by=0) == []
    again = splitter(mixed)
    for part in ("train", "valid", "test"):
        one = {items[i] for i in getattr(split, part).tolist()}
        assert one == {mixed[i] for i in getattr(again, part).tolist()}


@FEW
@given(st.sets(st.integers(), min_size=8, max_size=60), SEEDS, st.randoms())
def test_with_a_key_the_order_of_items_does_not_count(numbers, seed, random):
    items = sorted(numbers)
    mixed = random.sample(items, len(items))

    def parity(number):
        return number % 2

    for splitter in (
        random_split(valid=0.25, test=2, seed=seed, key=int),
        stratified_split(by=parity, valid=0.25, test=2, seed=seed, key=int),
        k_fold(4, 1, seed=seed, key=int),
        k_fold(4, 1, by=parity, seed=seed, key=int),
    ):
        one, other = splitter(items), splitter(mixed)
        assert {items[i] for i in one.valid.tolist()} == {mixed[i] for i in other.valid.tolist()}
        assert {items[i] for i in one.test.tolist()} == {mixed[i] for i in other.test.tolist()}


@FEW
@given(LABELS, st.integers(2, 4), SEEDS)
def test_folds_are_equal_balanced_and_hold_out_each_item_once(labels, k, seed):
    folds = [k_fold(k, fold, by=str, seed=seed)(labels) for fold in range(k)]
    assert sorted(torch.cat([fold.valid for fold in folds]).tolist()) == list(range(len(labels)))
    sizes = [len(fold.valid) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for label in set(labels):
        counts = [sum(labels[i] == label for i in fold.valid.tolist()) for fold in folds]
        assert max(counts) - min(counts) <= 1
    groups = [i // 2 for i in range(len(labels))]
    if len(set(groups)) >= k:
        whole = [k_fold(k, fold, groups=lambda i: i // 2, seed=seed)(range(len(labels))) for fold in range(k)]
        assert sorted(torch.cat([fold.valid for fold in whole]).tolist()) == list(range(len(labels)))
        assert all(find_leaks(groups, fold, by=int) == [] for fold in whole)


@FEW
@given(st.lists(st.integers(0, 20), min_size=3, max_size=60), SHARES)
def test_nothing_is_held_out_that_is_older_than_what_is_trained_on(times, shares):
    split = split_or_none(split_by_time(by=int, valid=shares[0], test=shares[1]), times)
    if split is not None:
        latest = [max((times[i] for i in ids.tolist()), default=-1) for ids in (split.train, split.valid)]
        earliest = [min((times[i] for i in ids.tolist()), default=99) for ids in (split.valid, split.test)]
        assert latest[0] < earliest[0] and latest[1] < earliest[1]


def test_a_split_is_the_same_in_a_new_process():
    program = (
        "from nbdev_trainer.data.splits import random_split\n"
        "from nbdev_trainer.data.splits_by import grouped_split, k_fold, stratified_split\n"
        "items = [(f'name {i}', i % 3, i % 7) for i in range(50)]\n"
        "splits = random_split(key=0), stratified_split(by=1), grouped_split(by=2), k_fold(5, 2, by=1)\n"
        "for split in splits: print(split(items).valid.tolist())\n"
    )
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    command = [sys.executable, "-c", program]
    told = [subprocess.check_output(command, text=True, timeout=120, env=one) for one in environments]
    assert told[0] == told[1] and told[0].count("\n") == 4


@FEW
@given(st.lists(st.integers(-3, 3) | st.text(max_size=2) | st.booleans() | st.none(), min_size=2))
def test_different_values_have_different_texts(values):
    for a in values:
        for b in values:
            assert (stable_text(a) == stable_text(b)) == (type(a) is type(b) and a == b)


def test_equal_files_on_one_side_or_unused_are_no_leak(tmp_path):
    items = [tmp_path / f"{i}.txt" for i in range(4)]
    for item, text in zip(items, ("same", "same", "other", "same")):
        item.write_text(text)
    split = Split(torch.tensor([0, 1]), torch.tensor([2]), unused=torch.tensor([3]))
    assert find_leaks(items, split) == []
    assert len(find_leaks(items, Split(torch.tensor([0]), torch.tensor([1, 3])))) == 1


def test_items_with_boxes_are_small_and_travel():
    item = Annotated(Path("a.jpg"), ((1, 2, 3, 4),), ("x",), (10, 10))
    assert pickle.loads(pickle.dumps(item)) == item and not hasattr(item, "__dict__")
    assert parent_name(Annotated(Path("b/a.jpg"), (), ())) == "b"
