"""Whether what a program prints is what a page says it prints."""

import re

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
RULE = re.compile(r"-{3,}")
TIME = re.compile(r"\d+(?:\.\d+)? (?:µs|ms|s)\b")
ROUNDING = 1e-14


def differences(printed, shown, rtol=2e-2, *, measured=False):
    """Lines that differ in a word, or in a number by more than ``rtol`` and its last digit.

    Rounding differs from one machine to the next, and the last digits of an iteration with it.
    Where times are ``measured``, they are not compared, nor how wide a column of them makes a table
    and where its text wraps; nor residuals of the size of rounding.
    """
    if measured:
        printed, shown = (RULE.sub("---", TIME.sub("TIME", text)) for text in (printed, shown))
    ours, theirs = printed.splitlines(), shown.splitlines()
    if len(ours) != len(theirs):
        if not measured:
            return [f"{len(ours)} lines, shown are {len(theirs)}:\n{printed}"]
        ours, theirs = [" ".join(ours)], [" ".join(theirs)]
    atol = ROUNDING if measured else 0.0
    return [
        f"printed  {a!r}\nshown    {b!r}"
        for a, b in zip(ours, theirs, strict=True)
        if not _alike(a, b, rtol, atol)
    ]


def _alike(printed, shown, rtol, atol):
    words = [" ".join(NUMBER.sub(" # ", line).split()) for line in (printed, shown)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(
        abs(float(a) - float(b)) <= rtol * abs(float(b)) + max(min(_unit(a), _unit(b)), atol)
        for a, b in pairs
    )


def _unit(number):
    """One unit of the last digit that is shown; integers have none to spare."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - digits) if digits or exponent else 0.0
