"""Which model on which partition of which GPU of which node, and how to get there."""
