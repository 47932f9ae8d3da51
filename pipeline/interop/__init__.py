"""Coming from other projects: their configurations and weights in this project's terms."""
