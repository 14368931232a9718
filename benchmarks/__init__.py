"""Measurements: each module prints tables; none is a test."""
