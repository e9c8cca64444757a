"""`mmtune runs`: what is below a folder of runs, of every kind, and runs side by side."""
