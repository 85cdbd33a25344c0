"""Published experiments, run again: the harness, and one module for each table or figure."""

from .imaml_fig2a import ImamlFig2a
from .reproduction import Check, Options, Outcome, Reproduction, Table

__all__ = ["REPRODUCTIONS", "Check", "Options", "Outcome", "Reproduction", "Table"]

REPRODUCTIONS: dict[str, Reproduction] = {one.name: one for one in (ImamlFig2a(),)}
"""Reproductions by name."""
