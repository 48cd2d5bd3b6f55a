"""The results of `formats`, faster: Triton kernels beside their pure-torch references.

Nothing here is imported before it is asked for by its full name, because Triton is missing on some machines.
"""
