"""The library beside others: compiled steps, parallel processes, shared folders."""
