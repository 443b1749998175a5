"""Helpers of the USegMix book: one module a stage of the method."""

import warnings

# A library that looks for notebook progress bars complains when there are none; ours are text.
warnings.filterwarnings("ignore", message="IProgress not found")
