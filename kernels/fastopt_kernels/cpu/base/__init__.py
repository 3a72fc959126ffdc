"""What all kernels stand on: memory, vector math, threads, the cache on disk."""
