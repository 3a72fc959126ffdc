"""Benchmarks of fastopt beside torch and its peers: `python -m bench.report`, `pytest bench`."""
