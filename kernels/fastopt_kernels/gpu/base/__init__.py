"""What all kernels stand on: the device, memory, arithmetic."""
