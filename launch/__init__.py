"""Runs on one machine or many: multinode.sh, Ray, the quick start."""
