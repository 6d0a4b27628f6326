"""What is wrong with a node, where it was seen, and what to do about it. Nothing is changed."""
