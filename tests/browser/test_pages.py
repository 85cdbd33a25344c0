"""Every page of the built site, in a browser: nothing broken, nothing loaded from elsewhere."""

import html
import os
import re
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

SITE = Path(os.environ.get("BILEVEL_SITE", "no-site"))
PAGES = sorted(
    path.relative_to(SITE).as_posix().removesuffix("index.html") for path in SITE.rglob("*.html")
)
# The first page of each folder.
SAMPLES = set({page.partition("/")[0]: page for page in reversed(PAGES)}.values())
WIDTHS = {"phone": 390, "desktop": 1280}
LIGHT, HEAVY = 1_000_000, (".png", ".jpg", ".svg", ".gif", ".ico")
AXE = Path(os.environ.get("BILEVEL_AXE", "axe.min.js"))

pytestmark = pytest.mark.skipif(not PAGES, reason="`make site-test` builds the site")

LEFT_OVER = re.compile(r"\\[a-zA-Z(\[]|\$[^$\n]+\$|\{\{")


@pytest.fixture(scope="module", params=WIDTHS)
def window(request, browser, address):
    """A window of one width, with all that goes wrong in it."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 900})
    page = context.new_page()
    page.trouble = []
    page.loaded = set()

    def asked(one):
        page.loaded.add(one.url)
        if not one.url.startswith((address, "data:", "blob:")):
            page.trouble.append(f"asked for {one.url}")

    def answered(one):
        if one.status >= 400:
            page.trouble.append(f"{one.status} for {one.url}")

    def said(one):
        if one.type in ("error", "warning"):
            page.trouble.append(f"console: {one.text}")

    page.on("request", asked)
    page.on("response", answered)
    page.on("console", said)
    page.on("pageerror", lambda error: page.trouble.append(f"error: {error}"))
    page.name = request.param
    yield page
    context.close()
    assert not page.trouble


@pytest.fixture(scope="module")
def loaded_by_all(browser, address):
    """What every page loads, some of it late: styles, scripts, and the index of the search."""
    page, loaded = browser.new_page(), set()
    page.on("request", lambda one: loaded.add(one.url))
    page.goto(f"{address}/404.html", wait_until="networkidle")
    page.close()
    loaded.remove(f"{address}/404.html")
    assert any(url.endswith("search_index.json") for url in loaded)
    return loaded


@pytest.mark.parametrize("path", PAGES)
def test_page(window, address, path, site, loaded_by_all):
    # What a page did after its own test is not forgotten: it fails the next one.
    window.loaded.clear()
    window.goto(f"{address}/{path}", wait_until="load")
    keep_picture(window, path)

    flat = window.eval_on_selector_all(
        "math",
        """all => all.filter(m => m.checkVisibility()).filter(m => {
            const box = m.getBoundingClientRect();
            return !(box.width * box.height);
        }).map(m => m.outerHTML)""",
    )
    assert not flat

    text = window.evaluate(
        """() => {
            const body = (document.querySelector('.md-content') ?? document.body).cloneNode(true);
            body.querySelectorAll('pre, code, annotation').forEach(one => one.remove());
            return body.textContent;
        }"""
    )
    assert not LEFT_OVER.search(text), LEFT_OVER.search(text)

    cut = window.eval_on_selector_all(
        'math[display="block"]',
        """all => all.filter(m => m.checkVisibility()).filter(m => {
            const ends = [...m.querySelectorAll('*')].map(x => x.getBoundingClientRect().right);
            return Math.max(...ends) > m.getBoundingClientRect().right + 1;
        }).map(m => m.textContent)""",
    )
    # A phone has to scroll some.
    assert not cut or window.name == "phone"

    broken = window.eval_on_selector_all(
        "img", "all => all.filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    )
    assert not broken
    assert window.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    weight = sum(size(site, url) for url in window.loaded | loaded_by_all)
    assert weight < LIGHT, f"{weight:,} bytes without pictures"
    found, window.trouble[:] = list(window.trouble), []
    assert not found
    if path in SAMPLES or (window.name == "desktop" and not path.startswith("source/")):
        assert_accessible(window, path)


@pytest.mark.parametrize("path", sorted(SAMPLES))
def test_dark_palette_can_be_read(browser, address, path):
    # The theme asks once, when a page is loaded.
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page.goto(f"{address}/{path}")
    assert page.evaluate("document.body.dataset.mdColorScheme ?? 'slate'") == "slate"
    page.add_script_tag(path=AXE)
    rules = "{runOnly: ['color-contrast', 'link-in-text-block']}"
    found = violations(page, "{exclude: ['math']}", rules)
    page.close()
    assert not found, "\n".join(found)


# What a reader might type, and a page that has to be among the first answers.
TERMS = {
    "hypergradient": "hypergradients",
    "ImplicitCG": "methods",
    "conjugate gradients": "concepts/hypergradients",
    "iMAML": "imaml",
    "Neumann series": "neumann",
    "negative curvature": "linear-solvers",
    "batch norm": "torch_func",
    "Stackelberg": "glossary",
    "zero gradient": "faq",
    "tolls": "tolls",
}


@pytest.mark.parametrize("term", TERMS)
def test_search_finds(browser, address, term):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    # The search listens once its index is there.
    page.goto(address, wait_until="networkidle")
    page.click("input[name=query]")
    page.locator("input[name=query]").press_sequentially(term, delay=20)
    page.wait_for_selector(".md-search-result__link")
    links = page.eval_on_selector_all(".md-search-result__link", "all => all.map(a => a.href)")
    page.close()
    # Sections of a page are answers of their own: the first pages, in order.
    pages = list(dict.fromkeys(urlsplit(link).path for link in links))[:5]
    assert any(TERMS[term] in one for one in pages), pages


HREF = re.compile(r"""\s(?:href|src)=["']?([^"'> ]+)""")
ANCHOR = re.compile(r"""\sid=["']?([^"'> ]+)""")


def test_every_internal_link_leads_somewhere(site):
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html")}
    anchors = {path: {"", *ANCHOR.findall(text)} for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        here = f"/{path.relative_to(site).as_posix()}".removesuffix("index.html")
        for href in map(html.unescape, HREF.findall(text)):
            parts = urlsplit(urljoin(f"http://here{here}", href))
            if parts.scheme not in ("http", "https") or parts.netloc != "here":
                continue
            target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{here}: {href}")
            elif target in pages and unquote(parts.fragment) not in anchors[target]:
                broken.append(f"{here}: {href} (no such anchor)")
    assert not broken, "\n".join(broken[:20])


def assert_accessible(window, path):
    """No serious finding of axe-core.

    MathML is left out, which is readable as it is, and so is highlighted code, but for one page of
    each folder: its colors are the same everywhere.
    """
    window.add_script_tag(path=AXE)
    context = "{exclude: ['math']}" if path in SAMPLES else "{exclude: ['math', 'pre']}"
    found = violations(window, context, "{resultTypes: ['violations']}")
    assert not found, "\n".join(found)


def violations(window, context, options):
    """What axe-core finds serious, with the first places of each."""
    return [
        f"{one['id']}: {one['help']}\n" + "\n".join(node["html"][:200] for node in one["nodes"][:3])
        for one in window.evaluate(f"axe.run({context}, {options})")["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def size(site, url):
    """Bytes of a file of the site, pictures not counted."""
    path = unquote(urlsplit(url).path).lstrip("/")
    file = site / path / "index.html" if path.endswith("/") or not path else site / path
    return 0 if file.suffix in HEAVY or not file.is_file() else file.stat().st_size


def keep_picture(window, path):
    """A screenshot, where they are asked for."""
    folder = os.environ.get("BILEVEL_SCREENSHOTS")
    if folder and not path.startswith("source/"):
        name = path.strip("/").replace("/", "--") or "home"
        window.screenshot(path=Path(folder) / f"{name}--{window.name}.png", full_page=True)
