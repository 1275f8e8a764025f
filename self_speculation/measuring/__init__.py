"""Measuring: strategies side by side, predictions, equivalence, what surrounds a figure, pictures."""
