"""The base of all kernels: memory, vector math, threads, the cache on disk."""
