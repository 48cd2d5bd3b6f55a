"""Models, and swapping the linear layers of any torch module."""
