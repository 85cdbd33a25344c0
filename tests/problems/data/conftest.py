"""Small stand-ins for the Omniglot archives, and the real data where there is any."""

import importlib
import os
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

CHARACTERS = {
    "images_background": ["Greek/character01", "Greek/character02", "Bengali/character01"],
    "images_evaluation": ["Angelic/character01", "Oriya/character01"],
}


def _png(number, shape=(105, 105), mode="1"):
    image = pytest.importorskip("PIL.Image")
    pixels = np.full(shape, 255, dtype=np.uint8)
    pixels[10 + number % 60 : 40 + number % 60, 20:50] = 0
    content = BytesIO()
    image.fromarray(pixels).convert(mode).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def png():
    """Makes a drawing with a black square whose place tells the number."""
    return _png


@pytest.fixture(scope="session")
def drawings():
    """Content of all files by their path, for each of the two parts."""
    parts, number = {}, 0
    for part, characters in CHARACTERS.items():
        files = parts[part] = {}
        for character in characters:
            for drawing in range(1, 21):
                files[f"{part}/{character}/{number:04d}_{drawing:02d}.png"] = _png(number + drawing)
            number += 1
    return parts


@pytest.fixture
def small_omniglot(monkeypatch):
    """The module, told that the archives hold 3 and 2 characters."""
    # The package's attribute of this name is the function.
    module = importlib.import_module("bilevel.problems.data.omniglot")
    monkeypatch.setattr(module, "_PARTS", {k: len(v) for k, v in CHARACTERS.items()})
    return module


@pytest.fixture
def write_zips(tmp_path, drawings):
    """Writes the two archives, with changed or additional members in one."""

    def write(folder=None, changes=None, drop=(), part="images_background"):
        folder = tmp_path / "data" if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, files in drawings.items():
            members = dict(files)
            if name == part:
                members |= changes or {}
                members = {k: v for k, v in members.items() if not k.startswith(tuple(drop))}
            with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{name}/", b"")
                for member, content in members.items():
                    archive.writestr(member, content)
        return folder

    return write


@pytest.fixture
def real_data():
    """The folder of the environment variable BILEVEL_DATA."""
    root = os.environ.get("BILEVEL_DATA", "")
    if not root:
        pytest.skip("the environment variable BILEVEL_DATA is not set")
    return Path(root)
