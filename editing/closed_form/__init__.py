"""What ROME, MEMIT and AlphaEdit share: places, keys, values and covariances."""
