"""Headless training of the demo models and of a student. Run a stage with ``python -m training.<stage>``."""
