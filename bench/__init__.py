"""Benchmarks: `python -m bench NAME` prints Markdown tables; --help lists the names. Nothing imports this."""
