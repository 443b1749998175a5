"""Helpers of the USegMix book: one module a stage of the method."""
