"""Whether what a program prints is what a page says it prints."""

import re

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
RULE = re.compile(r"-{3,}")
TIME = re.compile(r"\d+(?:\.\d+)? (?:µs|ms|s)\b")


def differences(printed, shown, rtol=2e-2):
    """Lines that differ in a word, or in a number by more than ``rtol`` and its last digit.

    Rounding differs from one machine to the next, and the last digits of an iteration with it.
    Times are those of the machine, and not compared, nor how wide a column of them makes a table
    and where its text wraps.
    """
    ours, theirs = printed.splitlines(), shown.splitlines()
    if len(ours) != len(theirs):
        ours, theirs = [" ".join(ours)], [" ".join(theirs)]
    return [
        f"printed  {a!r}\nshown    {b!r}"
        for a, b in zip(ours, theirs, strict=True)
        if not _alike(_steady(a), _steady(b), rtol)
    ]


def _steady(line):
    return RULE.sub("---", TIME.sub("TIME", line))


def _alike(printed, shown, rtol):
    words = [" ".join(NUMBER.sub(" # ", line).split()) for line in (printed, shown)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(
        abs(float(a) - float(b)) <= rtol * abs(float(b)) + min(_finest(a), _finest(b))
        for a, b in pairs
    )


def _finest(number):
    """One unit of the last digit that is shown, but no less than rounding."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return max(10.0 ** (int(exponent or 0) - digits), 1e-14) if digits or exponent else 0.0
