"""A model is loaded, trained step by step, and written: the same code alone, on several workers, and under Ray."""
