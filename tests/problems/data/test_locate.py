"""The folder of the data sets."""

import pytest

from bilevel.problems.data import DataError, data_root


def test_argument_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "other"))
    assert data_root(tmp_path) == tmp_path
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert data_root() == tmp_path


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    assert data_root("~/data") == tmp_path / "data"


@pytest.mark.parametrize("value", [None, ""])
def test_neither(monkeypatch, value):
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("BILEVEL_DATA", value)
    with pytest.raises(DataError, match="BILEVEL_DATA is not set; point"):
        data_root()


def test_no_folder(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"`root` = '.*none' is not a folder"):
        data_root(tmp_path / "none")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"variable BILEVEL_DATA = '.*none' is not a folder"):
        data_root()
