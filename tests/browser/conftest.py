"""The built site, served on this machine, and a browser that may go nowhere else.

`make site-test` builds the site and sets ``BILEVEL_SITE`` to it; without that these tests are
skipped. With ``BILEVEL_SCREENSHOTS`` set to a folder, every page is kept as a picture.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="session")
def site():
    """The folder of the built site."""
    return Path(os.environ["BILEVEL_SITE"])


@pytest.fixture(scope="session")
def address(site):
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, "install Chromium: the site is looked at in it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
