"""The compiled kernels of fastopt: update rules once, engines for CPU (Numba) and GPU (Triton).

Importing this package compiles nothing and imports neither backend.
"""
