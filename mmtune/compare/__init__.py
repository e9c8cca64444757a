"""Every listed method from the same start, on the same data, with the same budget, in one table."""
