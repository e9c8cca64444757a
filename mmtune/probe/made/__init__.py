"""The built-in probe set: pictures and questions made by a script, with a seed.

    python -m mmtune.probe.made --out runs/data/probe --each 12

Nothing in it was photographed or asked by people, and every number of it says so. The same seed
gives the same files, byte for byte.
"""
