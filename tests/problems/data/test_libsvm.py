"""LIBSVM files: what is read, what is refused, and where the error points."""

import bz2
import gzip
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.data import DataError, libsvm, read_libsvm


@pytest.fixture
def write(tmp_path):
    def write(content, name="data"):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        pack = {".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content))
        return path

    return write


VALUES = st.floats(allow_nan=False, allow_infinity=False)


@given(
    rows=st.lists(
        st.tuples(VALUES, st.dictionaries(st.integers(1, 12), VALUES, max_size=6)),
        min_size=1,
        max_size=6,
    ),
    end=st.sampled_from(["\n", "\r\n", " \n", "\n\n", " # note 3:4\n", "\t\n"]),
    last=st.booleans(),
    suffix=st.sampled_from(["", ".bz2", ".gz"]),
)
def test_what_is_written_is_read(tmp_path_factory, rows, end, last, suffix):
    text = end.join(
        " ".join([repr(label), *(f"{i}:{value!r}" for i, value in sorted(entries.items()))])
        for label, entries in rows
    )
    path = tmp_path_factory.mktemp("libsvm") / f"data{suffix}"
    pack = {".bz2": bz2.compress, ".gz": gzip.compress}.get(suffix, bytes)
    path.write_bytes(pack((text + end * last).encode()))
    X, y = read_libsvm(path, features=12)
    expected = torch.zeros(len(rows), 12, dtype=torch.float64)
    for row, (_, entries) in enumerate(rows):
        for i, value in entries.items():
            expected[row, i - 1] = value
    assert torch.equal(X, expected)
    assert y.tolist() == [label for label, _ in rows]


def test_width_and_dtype(write):
    path = write("+1 2:.5 4:-1e1\n-1 1:3.\n")
    X, y = read_libsvm(path)
    assert X.tolist() == [[0, 0.5, 0, -10], [3, 0, 0, 0]]
    assert y.tolist() == [1, -1]
    assert X.dtype == y.dtype == torch.float64
    X, y = read_libsvm(path, features=6, dtype=torch.float32)
    assert X.shape == (2, 6)
    assert X.dtype == y.dtype == torch.float32


def test_rows_without_entries(write):
    X, y = read_libsvm(write("1\n2 1:5\n3\n"))
    assert X.tolist() == [[0], [5], [0]]
    assert y.tolist() == [1, 2, 3]
    assert read_libsvm(write("1\n2\n"))[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("1 2:3 2:4", "has the index 2 after 2; sort"),
        ("1 3:3 2:4", "has the index 2 after 3; sort"),
        ("1 0:3", "has the index 0; count features from 1"),
        ("1 5:3", "has the index 5, but `features` is 4"),
        ("x 1:3", "starts with 'x', which is no number"),
        ("1:3 2:4", "starts with '1:3', which is no number"),
        ("nan 1:3", "starts with 'nan'"),
        ("1,2 1:3", "starts with '1,2'"),
        ("1 2", "has the entry '2'"),
        ("1 2:", "has the entry '2:'"),
        ("1 :2", "has the entry ':2'"),
        ("1 2:3:4", "has the entry '2:3:4'"),
        ("1 2 :3", "has the entry '2'"),
        ("1 -1:3", "has the entry '-1:3'"),
        ("1 1.0:3", "has the entry '1.0:3'"),
        ("1 1:inf", "has the entry '1:inf'"),
        ("1 1:1_0", "has the entry '1:1_0'"),
        ("1 1:0x1", "has the entry '1:0x1'"),
        ("1 1:1e999", "too large for a float at index 1"),
        ("1e999 1:1", "label too large"),
        ("1 qid:3 1:1", "has the entry 'qid:3'"),
        ("1 9999999999:1", "has the entry '9999999999:1'"),
        ("1 \xff:1", "has the entry"),
        ("1 1:1\r2:2", "which is not index:value"),
    ],
)
def test_the_line_is_named(write, line, finding):
    path = write(f"# a comment\n1 1:1 2:2\n\n{line}\n1 1:1\n")
    with pytest.raises(DataError) as caught:
        read_libsvm(path, features=4)
    assert f"'{path}' line 4 " in str(caught.value)
    assert finding in str(caught.value)


def test_a_long_bad_line_is_refused_quickly_and_briefly(write):
    path = write("1 1:" + "1" * 1_000_000 + "x\n")
    with pytest.raises(DataError) as caught:
        read_libsvm(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_empty_files(write, content):
    with pytest.raises(DataError, match="holds no row"):
        read_libsvm(write(content))


@pytest.mark.parametrize("name", ["data.bz2", "data.gz"])
@pytest.mark.parametrize("damage", ["truncate", "garbage", "alter"])
def test_broken_compression(write, name, damage):
    path = write("".join(f"{i} 1:{math.sin(i)}\n" for i in range(500)), name)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncate": content[:middle],
            "garbage": b"<html>Not Found</html>",
            "alter": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
        }[damage]
    )
    with pytest.raises(DataError, match=r"cannot be read .* fetch the file again"):
        read_libsvm(path)


@pytest.mark.parametrize("name", ["data", "data.bz2", "data.gz"])
def test_text_is_bounded(write, name, monkeypatch):
    module = importlib.import_module("bilevel.problems.data.libsvm")
    monkeypatch.setattr(module, "_MAX_BYTES", 1 << 20)
    path = write(b"\n" * (2 << 20), name)
    with pytest.raises(DataError, match="more than 1 MiB of text"):
        read_libsvm(path)


def test_the_dense_matrix_is_bounded(write):
    with pytest.raises(DataError, match="dense matrix of 1×900000000"):
        read_libsvm(write("1 900000000:1\n"))


def test_missing_file_and_wrong_features(tmp_path, write):
    with pytest.raises(DataError, match="does not exist"):
        read_libsvm(tmp_path / "none")
    with pytest.raises(DataError, match="`features` is 0"):
        read_libsvm(write("1 1:1\n"), features=0)


@pytest.mark.parametrize("folder", ["", "libsvm"])
@pytest.mark.parametrize("suffix", ["", ".bz2", ".gz"])
def test_files_are_found_by_name(tmp_path, monkeypatch, folder, suffix):
    (tmp_path / folder).mkdir(exist_ok=True)
    pack = {".bz2": bz2.compress, ".gz": gzip.compress}.get(suffix, bytes)
    (tmp_path / folder / f"tiny.t{suffix}").write_bytes(pack(b"1 1:2\n"))
    assert libsvm("tiny.t", tmp_path, features=3)[0].tolist() == [[2, 0, 0]]
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert libsvm("tiny.t")[0].tolist() == [[2]]


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"holds none of a9a, a9a\.bz2 and a9a\.gz"):
        libsvm("a9a", tmp_path)
    for name in ("../a9a", "/etc/passwd", ""):
        with pytest.raises(DataError, match="plain file name"):
            libsvm(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "features", "entries", "positive"),
    [("a9a", 32_561, 123, 451_592, 7_841), ("mushrooms", 8_124, 112, 170_604, 8_124)],
)
def test_real_files(real_data, name, rows, features, entries, positive):
    try:
        X, y = libsvm(name, real_data)
    except DataError as error:
        if "holds none of" in str(error):
            pytest.skip(str(error))
        raise
    assert X.shape == (rows, features)
    assert X.count_nonzero() == entries
    assert (y > 0).sum() == positive
