"""Losses that compare samples with samples."""
