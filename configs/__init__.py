"""Configuration files: each has `get_config()`."""
