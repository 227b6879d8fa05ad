"""Weights in, a policy with its adapter out."""
