"""Measured comparisons with TRL alone, each a command; RESULTS.md holds the table it last printed."""
