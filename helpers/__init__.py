"""Helpers of the USegMix book: one module a stage of the method."""

import warnings

from helpers.memory import keep_freed_blocks

# A library that looks for notebook progress bars complains when there are none; ours are text.
warnings.filterwarnings("ignore", message="IProgress not found")

keep_freed_blocks()
