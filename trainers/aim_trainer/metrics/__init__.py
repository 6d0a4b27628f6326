"""What is told of a run while it runs, and where: files, TensorBoard, Prometheus, a terminal."""
