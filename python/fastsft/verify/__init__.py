"""Runs code that a model wrote, and counts how often it is right."""
