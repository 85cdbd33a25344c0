"""Published experiments, run again: the harness, and one module for each table or figure."""

__all__: list[str] = []
