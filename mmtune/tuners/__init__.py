"""How a model is tuned: each method a PEFT tuner."""

# PEFT first, and whole: importing it enters the tuners of this package in its tables, which must
# not happen halfway through the import of one of them.
import peft  # noqa: F401
