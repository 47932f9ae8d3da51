"""Losses that keep features or prototypes of earlier steps."""
