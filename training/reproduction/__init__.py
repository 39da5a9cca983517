"""The parts of the reproduction; ``training.reproduce`` puts them together."""
