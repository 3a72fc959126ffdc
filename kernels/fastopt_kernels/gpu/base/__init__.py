"""The base of all kernels: the device, memory, arithmetic."""
