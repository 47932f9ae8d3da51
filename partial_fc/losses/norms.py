"""Margins that depend on the feature norm, or on how rare an identity is."""
