"""How a model is tuned: each method a PEFT tuner."""

import logging

# PEFT imports bitsandbytes where it is installed, which then tells of every fast kernel that this
# machine lacks, whatever is asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# PEFT first, and whole: importing it enters the tuners of this package in its tables, which must
# not happen halfway through the import of one of them.
import peft  # noqa: E402, F401
