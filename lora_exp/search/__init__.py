"""Searches: Optuna draws the trials of a sweep, and ends those that fall behind."""
