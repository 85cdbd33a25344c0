"""Published experiments, run again: the harness, and one module for each table or figure."""

from .imaml_fig2a import ImamlFig2a
from .imaml_fig2b import ImamlFig2b
from .imaml_methods import ImamlMethods
from .imaml_strength import ImamlStrength
from .imaml_table2 import ImamlTable2
from .imaml_table3 import ImamlTable3
from .reproduction import Check, Options, Origin, Outcome, Reproduction, Table

__all__ = ["REPRODUCTIONS", "Check", "Options", "Origin", "Outcome", "Reproduction", "Table"]

REPRODUCTIONS: dict[str, Reproduction] = {
    one.name: one
    for one in (
        ImamlTable2(),
        ImamlTable3(),
        ImamlFig2a(),
        ImamlFig2b(),
        ImamlMethods(),
        ImamlStrength(),
    )
}
"""Reproductions by name."""
