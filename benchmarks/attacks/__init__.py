"""Attacks on what the documentation promises, one module a theme; ``python -m benchmarks.faults`` runs them."""
