"""Measured evidence: load on a live server, and what came of it."""
