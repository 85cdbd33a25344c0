"""Omniglot: layouts, cache, and archives that are broken or hostile."""

import contextlib
import os
import struct
import sys
import zipfile
import zlib
from random import Random

import pytest
import torch

from bilevel.errors import BilevelWarning
from bilevel.problems.data import (
    DataError,
    EpisodeSampler,
    omniglot,
    omniglot_split,
    pixel_nearest_neighbour,
)

FIRST = "images_background/Greek/character01/0000_01.png"
NAMES = (
    "Angelic/character01",
    "Bengali/character01",
    "Greek/character01",
    "Greek/character02",
    "Oriya/character01",
)


@pytest.fixture
def load(small_omniglot, tmp_path):
    """`omniglot` on small archives, with a cache of its own."""

    def load(root, cache=tmp_path / "cache", **options):
        return small_omniglot.omniglot(root, cache=cache, **options)

    return load


def unpack(folder):
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        path.unlink()


# ---- What is read -------------------------------------------------------------------------------


def test_characters_are_pooled_and_sorted(load, write_zips):
    pool = load(write_zips())
    assert pool.names == NAMES
    assert pool.images.shape == (5, 20, 1, 28, 28)
    assert pool.images.dtype == torch.uint8
    # Paper is white, the square is black.
    assert pool.images[..., 0, 0].eq(255).all()
    assert pool.images.amin((2, 3, 4)).eq(0).all()


def test_drawings_keep_their_character(load, write_zips, png, small_omniglot):
    pool = load(write_zips())
    # Greek/character02 is the second character written, its number is 1.
    expected = small_omniglot._pixels("", png(1 + 7), 28)
    assert (pool.images[3, 6, 0].numpy() == expected).all()


@pytest.mark.parametrize("inside", ["", "omniglot", "omniglot-py"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_layouts_give_the_same(load, write_zips, tmp_path, inside, unpacked):
    reference = load(write_zips())
    folder = write_zips(tmp_path / "other" / inside)
    if unpacked:
        unpack(folder)
    pool = load(tmp_path / "other", cache=tmp_path / "cache2")
    assert pool.names == reference.names
    assert torch.equal(pool.images, reference.images)


def test_root_comes_from_the_environment(load, write_zips, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(write_zips()))
    assert load(None).names == NAMES


def test_size_is_that_asked_for(load, write_zips):
    root = write_zips()
    assert load(root, size=14).images.shape[-2:] == (14, 14)
    assert load(root, size=28).images.shape[-2:] == (28, 28)
    for size in (0, 106):
        with pytest.raises(ValueError, match=f"`size` is {size}"):
            load(root, size=size)


def test_other_files_are_ignored(load, write_zips):
    changes = {
        "images_background/.DS_Store": b"x",
        "__MACOSX/images_background/Greek/character01/._0000_01.png": b"x",
        "images_background/Greek/character01/notes.png": b"x",
    }
    assert load(write_zips(changes=changes)).names == NAMES


def test_pillow_is_asked_for(load, write_zips, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[data\]'"):
        load(write_zips())


# ---- What is missing ----------------------------------------------------------------------------


def test_nothing_there(load, tmp_path):
    with pytest.raises(DataError, match=r"holds no images_background\.zip .* point `root`"):
        load(tmp_path)


def test_one_archive_missing(load, write_zips):
    root = write_zips()
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(DataError, match=r"neither images_evaluation\.zip nor"):
        load(root)


def test_character_missing(load, write_zips):
    root = write_zips(drop=["images_background/Greek/character02"])
    with pytest.raises(DataError, match="holds 2 characters instead of 3"):
        load(root)


@pytest.mark.parametrize("unpacked", [False, True])
def test_drawing_missing(load, write_zips, unpacked):
    root = write_zips(drop=[FIRST])
    if unpacked:
        unpack(root)
    with pytest.raises(DataError, match="19 drawings of Greek/character01 instead of 20"):
        load(root)


# ---- Hostile and broken archives ----------------------------------------------------------------


@pytest.fixture
def refused(load, tmp_path):
    """Loading fails with a `DataError` that matches, and writes nothing anywhere."""

    def refused(root, finding):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=finding) as caught:
            load(root)
        assert str(root) in str(caught.value)
        assert "fetch it again" in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return refused


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_archive(refused, write_zips, keep):
    root = write_zips()
    path = root / "images_background.zip"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    refused(root, "no sound zip file")


def test_no_archive_at_all(refused, write_zips):
    root = write_zips()
    (root / "images_background.zip").write_bytes(b"<html>Not Found</html>" * 100)
    refused(root, "no sound zip file")


def test_altered_byte(refused, write_zips):
    root = write_zips()
    path = root / "images_background.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(FIRST)
    at = member.header_offset + 30 + len(FIRST) + member.compress_size // 2
    content[at] ^= 0x55
    path.write_bytes(content)
    refused(root, "no sound zip file")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "/outside.png",
        "images_background/../../outside.png",
        "images_background/Greek/..",
        "..\\outside.png",
        "C:/outside.png",
        "images_background/Greek/character01/0000_21.png\0.txt",
    ],
)
def test_unsafe_member_names(refused, write_zips, name, png):
    # `writestr` would cut the name at the null byte.
    place = "images_background/" + "x" * (len(name) - len("images_background/"))
    place = place[: len(name)] if len(name) > 18 else "y" * len(name)
    root = write_zips(changes={place: png(0)})
    path = root / "images_background.zip"
    path.write_bytes(path.read_bytes().replace(place.encode(), name.encode()))
    refused(root, "unsafe name")


def test_large_member(refused, write_zips):
    refused(write_zips(changes={FIRST: b"\0" * (1 << 20)}), "1048576 bytes, more than 65536")


def test_large_total(refused, write_zips, small_omniglot, monkeypatch):
    monkeypatch.setattr(small_omniglot, "_MAX_TOTAL", 1 << 20)
    changes = {f"images_background/junk{i}": b"\0" * 65_000 for i in range(20)}
    refused(write_zips(changes=changes), "unpacks to more than 1 MiB")


def test_many_members(refused, write_zips, small_omniglot, monkeypatch):
    monkeypatch.setattr(small_omniglot, "_MAX_MEMBERS", 50)
    refused(write_zips(), "members, more than 50")


def test_large_archive(refused, write_zips):
    root = write_zips()
    with (root / "images_background.zip").open("ab") as file:
        file.truncate(65 << 20)
    refused(root, "more than 67108864 bytes")


def test_member_that_lies_about_its_size(refused, write_zips):
    """A declared size of 100 bytes over a megabyte: the read stays bounded."""
    root = write_zips(changes={FIRST: b"\0" * (1 << 20)})
    path = root / "images_background.zip"
    size = struct.pack("<I", 1 << 20)
    content = path.read_bytes()
    assert content.count(size) >= 2
    path.write_bytes(content.replace(size, struct.pack("<I", 100)))
    refused(root, "no sound zip file")


def test_encrypted_member(refused, write_zips):
    root = write_zips()
    path = root / "images_background.zip"
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 1)
    path.write_bytes(content)
    refused(root, "no sound zip file .*encrypted")


@pytest.mark.parametrize("seed", range(100))
def test_random_damage_gives_no_other_error(small_omniglot, tmp_path, png, monkeypatch, seed):
    monkeypatch.setattr(small_omniglot, "_PARTS", {"images_background": 1})
    monkeypatch.setattr(small_omniglot, "_DRAWINGS", 2)
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(2):
            archive.writestr(f"images_background/Gr\u00e9/character01/0001_0{i}.png", png(i))
    content = bytearray(path.read_bytes())
    random = Random(seed)
    for _ in range(random.choice((1, 2, 5))):
        content[random.randrange(len(content))] = random.choice((0, 255, random.randrange(256)))
    path.write_bytes(content)
    # Damage in a field that nothing depends on, such as a date, is no error.
    with contextlib.suppress(DataError):
        small_omniglot._decode([path], 28)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_that_appears_twice(refused, write_zips, png):
    root = write_zips()
    with zipfile.ZipFile(root / "images_background.zip", "a") as archive:
        archive.writestr(FIRST, png(3))
    refused(root, "appears a second time")


def test_image_bomb_is_refused_before_decoding(refused, write_zips, png):
    header = struct.pack(">II", 60_000, 60_000) + bytes([1, 0, 0, 0, 0])
    chunk = b"IHDR" + header
    bomb = png(0)[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    refused(write_zips(changes={FIRST: bomb + png(0)[33:]}), "60000×60000 pixels instead of")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (lambda png: png(0, shape=(28, 28)), "28×28 pixels instead of 105×105"),
        (lambda png: png(0, mode="RGB"), "mode RGB"),
        (lambda png: png(0)[:60], "broken PNG"),
        (lambda png: png(0)[:24], "broken PNG"),
        (lambda png: png(0)[:12], "no PNG"),
        (lambda png: b"", "no PNG"),
        (lambda png: b"GIF89a" + b"\0" * 100, "no PNG"),
    ],
)
def test_wrong_images(refused, write_zips, png, content, finding):
    refused(write_zips(changes={FIRST: content(png)}), finding)


def test_altered_pixels_in_a_folder(refused, write_zips, png):
    root = write_zips()
    unpack(root)
    content = bytearray(png(0))
    content[len(content) // 2] ^= 0xFF
    (root / FIRST).write_bytes(content)
    refused(root, "broken PNG")


# ---- Cache --------------------------------------------------------------------------------------


@pytest.fixture
def decodings(small_omniglot, monkeypatch):
    """Counts how often the sources are decoded."""
    calls, decode = [], small_omniglot._decode
    monkeypatch.setattr(
        small_omniglot, "_decode", lambda *args: calls.append(args) or decode(*args)
    )
    return calls


def test_second_call_reads_the_cache(load, write_zips, decodings, monkeypatch):
    root = write_zips()
    first = load(root)
    monkeypatch.setitem(sys.modules, "PIL", None)
    again = load(root)
    assert len(decodings) == 1
    assert again.names == first.names
    assert torch.equal(again.images, first.images)


@pytest.mark.parametrize("unpacked", [False, True])
def test_changed_sources_are_decoded_again(load, write_zips, decodings, png, unpacked):
    root = write_zips()
    if unpacked:
        unpack(root)
    first = load(root)
    if unpacked:
        os.utime(root / FIRST, ns=(1, 1))
        (root / FIRST).write_bytes(png(40))
    else:
        write_zips(changes={FIRST: png(40)})
    again = load(root)
    assert len(decodings) == 2
    assert not torch.equal(again.images, first.images)


@pytest.mark.parametrize("damage", ["truncate", "empty", "alter", "garbage", "directory"])
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
def test_corrupt_cache_is_built_again(load, write_zips, decodings, tmp_path, damage):
    root = write_zips()
    first = load(root)
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    if damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        middle = len(content) // 2
        path.write_bytes(
            {
                "truncate": content[:middle],
                "empty": b"",
                "alter": content[:300] + bytes([content[300] ^ 1]) + content[301:],
                "garbage": b"no zip" * 100,
            }[damage]
        )
    again = load(root)
    assert len(decodings) == 2
    assert torch.equal(again.images, first.images)
    if damage != "directory":
        load(root)
        assert len(decodings) == 2
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_cache_that_cannot_be_written_warns(load, write_zips, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    root = write_zips()
    with pytest.warns(BilevelWarning, match="cannot be written .* as `cache`"):
        pool = load(root, cache=blocked)
    assert pool.names == NAMES
    assert blocked.read_text() == "no folder"


def test_full_disk_leaves_no_half_written_file(load, write_zips, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(BilevelWarning, match="No space left on device"):
        pool = load(write_zips())
    assert pool.names == NAMES
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_is_written_outside_the_cache(load, write_zips, tmp_path):
    root = write_zips()
    before = set(tmp_path.rglob("*"))
    load(root)
    new = set(tmp_path.rglob("*")) - before
    assert {path.parent for path in new} == {tmp_path, tmp_path / "cache"}
    assert len(new) == 2


# ---- The real data ------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_omniglot(real_data, tmp_path):
    if not any((real_data / d / "images_background.zip").is_file() for d in ("", "omniglot")):
        pytest.skip("BILEVEL_DATA holds no Omniglot")
    pool = omniglot(real_data, cache=tmp_path)
    assert pool.images.shape == (1623, 20, 1, 28, 28)
    assert len({name.split("/")[0] for name in pool.names}) == 50
    # Thin ink on white paper.
    assert 0.85 < pool.images.float().mean() / 255 < 0.97
    train, test = omniglot_split(pool)
    assert (len(train), len(test)) == (1200, 423)
    assert not set(train.names) & set(test.names)
    accuracy = pixel_nearest_neighbour(EpisodeSampler(test, 5, 1, 5, 200)(0)).mean()
    assert 0.35 < accuracy < 0.6
