"""One vocabulary: names of folders and modules, code, docstrings, messages and pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bilevel", "solvers", "problems", "experiments", "benchmarks", "docs", "tests", ".ci")

# What is not said, and what is said instead.
WORDS = {
    r"hyper[- ]gradient|meta[- ]?gradient": "hypergradient",
    r"(upper|lower)[- ]level": "outer, inner",
    r"leader|follower": "outer, inner",
    r"(inner|outer)[- ](loss|cost|criterion)": "inner objective, outer objective",
    r"inner[- ](optimi[sz]er|loop solver)": "inner solver",
    r"prox(imal)?[- ]term": "proximal regularizer",
    r"regulariser": "regularizer",
    r"optimiser": "optimizer",
    r"initiali[z]ation": "initialisation",
    r"colour": "color",
    r"behaviour|behavior": "what it does",
    r"pre-?conditionner": "preconditioner",
    r"back-?prop(agation)?|backpropagate": "reverse differentiation, unrolling",
}

# These explain synonyms, quote those who use them, or give titles of papers.
EXPLAIN = {
    "docs/explanations/citing.md",
    "docs/explanations/faq.md",
    "docs/explanations/glossary.md",
    "docs/explanations/peers.md",
    "docs/tutorials/coming_from.md",
}
# Recorded under this name before there was one word.
RECORDED = re.compile(r"meta[-_]gradient(?=\.py|\.json|\.png|\"| \w+ | }})")
# Where a word of a name ends: `inner_loss`, `InnerLoss`.
SEAM = re.compile(r"_|(?<=[a-z0-9])(?=[A-Z])")

FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md") and path.name != Path(__file__).name
] + ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "mkdocs.yml"]


def said(pattern, line):
    """Whether a line has the word, in a sentence or in a name."""
    word = rf"\b(?:{pattern})s?\b"
    return re.search(word, SEAM.sub(" ", line), flags=re.IGNORECASE)


@pytest.mark.parametrize(("pattern", "instead"), WORDS.items(), ids=WORDS.values())
def test_one_word_for_one_thing(pattern, instead):
    found = []
    for name in FILES:
        if name in EXPLAIN:
            continue
        text = RECORDED.sub("", (ROOT / name).read_text("utf-8"))
        lines = enumerate([RECORDED.sub("", name), *text.splitlines()])
        found += [f"{name}:{n}: {line.strip()}" for n, line in lines if said(pattern, line)]
    assert not found, f"say {instead}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line", ["upper_level = 1", "class UpperLevel:", "the upper-level problem", "Upper levels"]
)
def test_names_are_read_as_words(line):
    assert said(r"(upper|lower)[- ]level", line)
    assert not said(r"(upper|lower)[- ]level", line.replace("pper", "tter"))


def test_explanations_of_synonyms_exist():
    assert all((ROOT / name).exists() for name in EXPLAIN)
