"""NPT-Loss: the nearest prototypes alone."""
