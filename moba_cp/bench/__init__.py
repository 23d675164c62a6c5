"""Measurements, as commands."""
