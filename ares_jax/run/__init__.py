"""A run: its folder, opened."""
