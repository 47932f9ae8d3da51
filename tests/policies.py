"""Device policies for tests: small chunks, so that small cases have several, with the ways of a CPU and with those of a GPU."""

from dataclasses import replace

from partial_fc.device_policy import CPU, GPU

POLICIES = {"cpu": replace(CPU, tile_bytes=1, moved_elements=40), "gpu": replace(GPU, tile_bytes=1, moved_elements=40)}
