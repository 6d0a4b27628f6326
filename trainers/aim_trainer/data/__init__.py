"""Rows of any format become tokens on disk, each with the mask of what is trained."""
