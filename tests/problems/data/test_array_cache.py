"""The cache folder and its files."""

import os

import numpy as np
import pytest

from bilevel.problems.data.array_cache import cache_folder, load_arrays, save_arrays


def test_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "bilevel"
    for invalid in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert cache_folder() == tmp_path / ".cache" / "bilevel"


def test_round_trip(tmp_path):
    arrays = {"images": np.arange(6, dtype=np.uint8).reshape(2, 3), "names": np.array(["a", "äß"])}
    save_arrays(tmp_path / "deep" / "file.npz", arrays)
    loaded = load_arrays(tmp_path / "deep" / "file.npz")
    assert sorted(loaded) == ["images", "names"]
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array)


def test_missing_file(tmp_path):
    assert load_arrays(tmp_path / "none.npz") is None


def test_pickles_are_not_loaded(tmp_path):
    np.savez(tmp_path / "file.npz", images=np.array([{}], dtype=object), sha256=np.array(""))
    assert load_arrays(tmp_path / "file.npz") is None


def test_content_without_the_right_checksum(tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros(3))
    assert load_arrays(tmp_path / "plain.npz") is None
    np.savez(tmp_path / "wrong.npz", images=np.zeros(3), sha256=np.array("0" * 64))
    assert load_arrays(tmp_path / "wrong.npz") is None


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.npz"
    save_arrays(path, {"a": np.zeros(2)})

    def interrupted(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(path, {"a": np.ones(2)})
    assert load_arrays(path)["a"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["file.npz"]
