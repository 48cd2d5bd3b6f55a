"""Measuring: how close two pictures or tensors are, how long a run takes, and the tables that compare runs."""
