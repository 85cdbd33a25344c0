"""Mini-ImageNet: three layouts, and files that are broken or hostile."""

import importlib
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch

from bilevel.problems.data import DataError, EpisodeSampler, mini_imagenet

CLASSES = ("n02", "n01", "n03")
COUNT = 4


def picture(label, number, shape=(84, 84), kind="PNG"):
    """A picture whose color tells class and number."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 10 * label, 20 * number, 200
    content = BytesIO()
    image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The module, told that each split has 3 classes."""
    module = importlib.import_module("bilevel.problems.data.mini_imagenet")
    monkeypatch.setattr(module, "_SPLITS", {"train": 3, "val": 3, "test": 3})


def arrays(**changes):
    files = [picture(label, n) for label in range(3) for n in range(COUNT)]
    out = {
        "data": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *(len(file) for file in files)]).astype(np.int64),
        "labels": np.repeat(np.arange(3), COUNT),
        "classes": np.array(CLASSES),
    }
    return {**out, **changes}


def write_arrays(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in arrays(**changes).items() if value is not None}
    np.savez(folder / "train.npz", **kept)
    return folder


def write_listing(folder, kind="PNG", shape=(84, 84), lines=None):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for label, name in enumerate(CLASSES):
        for n in range(COUNT):
            file = f"{name}{n:08d}.{kind.lower()}"
            (folder / "images" / file).write_bytes(picture(label, n, shape, kind))
            rows.append(f"{file},{name}")
    (folder / "train.csv").write_text("\n".join(["filename,label", *(lines or rows)]) + "\n")
    return folder


def write_folders(folder):
    for label, name in enumerate(CLASSES):
        (folder / "train" / name).mkdir(parents=True)
        for n in range(COUNT):
            (folder / "train" / name / f"{n}.png").write_bytes(picture(label, n))
        (folder / "train" / name / "notes.txt").write_text("not a picture")
    return folder


LAYOUTS = {"arrays": write_arrays, "listing": write_listing, "folders": write_folders}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("below", ["", "mini-imagenet", "miniImagenet"])
def test_every_layout_gives_the_same_pictures(write, below, tmp_path):
    write(tmp_path / below)
    pool = mini_imagenet(tmp_path)
    assert pool.names == ("n01", "n02", "n03")
    assert pool.images.shape == (3, COUNT, 3, 84, 84)
    assert pool.images.dtype == torch.uint8
    # The second class of the list comes first by name.
    assert pool.images[:, 0, 0, 0, 0].tolist() == [10, 0, 20]
    assert pool.images[0, :, 1, 5, 5].tolist() == [0, 20, 40, 60]
    assert pool.images[:, :, 2].eq(200).all()


def test_pictures_are_resized_and_lossy_ones_are_read(tmp_path):
    write_listing(tmp_path, kind="JPEG", shape=(60, 90))
    pool = mini_imagenet(tmp_path, size=20)
    assert pool.images.shape == (3, COUNT, 3, 20, 20)
    assert (pool.images[2, 0, 2].int() - 200).abs().max() <= 3


def test_the_environment_variable_names_the_folder(tmp_path, monkeypatch):
    write_arrays(tmp_path / "mini-imagenet")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert len(mini_imagenet()) == 3


def test_episodes_are_drawn_from_it(tmp_path):
    batch = EpisodeSampler(mini_imagenet(write_arrays(tmp_path)), 2, 1, 2, tasks=3)(0)
    assert batch.inner_batch[0].shape == (3, 2, 3, 84, 84)
    assert batch.inner_batch[0].max() <= 1


BROKEN = {
    "data": ({"data": None}, "has no array 'data'"),
    "dtype": ({"data": np.zeros(9, np.float32)}, "instead of uint8"),
    "offsets": ({"offsets": np.arange(5)}, r"has \(5,\) `offsets` for \(12,\) `labels`"),
    "beyond": ({"offsets": np.arange(13) * 10**9}, "leave its"),
    "unsigned": ({"offsets": np.arange(13, dtype=np.uint64)[::-1].copy()}, "or fall"),
    "falling": ({"offsets": np.arange(13)[::-1].copy()}, "or fall"),
    "label": ({"labels": np.full(12, 3)}, "a label outside its 3 `classes`"),
    "content": ({"offsets": np.arange(13)}, "picture 0' is no sound picture"),
    "classes": ({"labels": np.repeat([0, 1], 6)}, "holds 2 classes instead of 3"),
    "unequal": (
        {"labels": np.repeat([0, 1, 2], [5, 3, 4])},
        "holds 3 pictures of n01 but 5 of n02",
    ),
    "pickled": ({"classes": np.array(CLASSES, dtype=object)}, "no sound npz file"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_arrays_are_named(changes, message, tmp_path):
    write_arrays(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        mini_imagenet(tmp_path)


def test_arrays_that_unpack_to_too_much_are_not_unpacked(tmp_path, monkeypatch):
    module = importlib.import_module("bilevel.problems.data.mini_imagenet")
    monkeypatch.setattr(module, "_MAX_FILE", 1 << 20)
    kept = {**arrays(), "data": np.zeros(2 << 20, np.uint8)}
    np.savez_compressed(tmp_path / "train.npz", **kept)
    assert (tmp_path / "train.npz").stat().st_size < 1 << 16
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        mini_imagenet(tmp_path)


def test_a_header_that_asks_for_all_memory_is_named(tmp_path):
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 62,)}
    )
    with zipfile.ZipFile(write_arrays(tmp_path, data=None) / "train.npz", "a") as file:
        file.writestr("data.npy", header.getvalue())
    with pytest.raises(DataError, match="no sound npz file"):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_file_is_named(tmp_path, share):
    path = write_arrays(tmp_path) / "train.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"train.npz' is no sound npz file"):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["../secret.png,n01"], r"line 2' names no picture in images/: '../secret.png'"),
        (["missing.png,n01"], r"missing.png' cannot be read"),
        ([",n01"], r"line 2' names no picture"),
    ],
)
def test_a_broken_listing_is_named(lines, message, tmp_path):
    write_listing(tmp_path, lines=lines)
    with pytest.raises(DataError, match=message):
        mini_imagenet(tmp_path)


def test_a_listing_without_its_columns_is_named(tmp_path):
    write_listing(tmp_path)
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no columns `filename` and `label`"):
        mini_imagenet(tmp_path)


def test_a_picture_larger_than_it_may_be_is_refused_before_decoding(tmp_path):
    write_folders(tmp_path)
    huge = picture(0, 0, shape=(5000, 5000))
    (tmp_path / "train/n01/0.png").write_bytes(huge)
    with pytest.raises(DataError, match="has 5000×5000 pixels"):
        mini_imagenet(tmp_path)


def test_what_is_missing_is_listed(tmp_path):
    with pytest.raises(DataError, match=r"neither train.npz nor train.csv nor a folder train/"):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"split": "valid"}, "`split` is 'valid'"), ({"size": 85}, "`size` is 85")],
)
def test_settings_are_checked(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mini_imagenet(tmp_path, **settings)


def test_the_real_validation_pictures(real_data, monkeypatch):
    monkeypatch.undo()
    pool = mini_imagenet(real_data, "val", size=20)
    assert pool.images.shape == (16, 600, 3, 20, 20)
    assert pool.names[0] == "n01855672"
    assert 90 < pool.images.float().mean() < 135


@pytest.mark.slow
def test_the_real_pictures(real_data, monkeypatch):
    monkeypatch.undo()
    pools = {split: mini_imagenet(real_data, split) for split in ("train", "val", "test")}
    assert [pool.images.shape[:2] for pool in pools.values()] == [(64, 600), (16, 600), (20, 600)]
    assert pools["test"].images.shape == (20, 600, 3, 84, 84)
    names = [name for pool in pools.values() for name in pool.names]
    assert len(set(names)) == 100
    assert pools["test"].names[0] == "n01930112"
    for pool in pools.values():
        # Pictures, not noise or blanks: they differ, and their means are those of photographs.
        assert 90 < pool.images.float().mean() < 135
        assert pool.images[:, :5].float().std((2, 3, 4)).gt(5).all()
