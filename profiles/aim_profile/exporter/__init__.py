"""What Prometheus is told of a node: its cards, partitions, memory, prices, and what is not as planned."""
