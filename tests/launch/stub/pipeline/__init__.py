"""Stands in for the trainer in the launch tests: seconds instead of minutes, and every step leaves a file."""
