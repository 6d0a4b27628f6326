"""Toxicity in texts: six labels by the embedded model of Jigsaw's comments, or by a model that options name."""
