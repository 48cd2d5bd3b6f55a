"""Checkpoint files: containers, their checks, and the namings of FLUX.1."""
