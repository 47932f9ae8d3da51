"""Losses that weigh hard non-targets, or the whole probability, anew."""
