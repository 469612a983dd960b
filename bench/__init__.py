"""Benchmarks: `python -m bench kernels|step|reading|memory|compile` prints Markdown tables. Nothing imports this."""
