"""Benchmarks: one module each, with a ``main()`` that prints a table. ``make bench`` runs all."""
