"""What a model is, as far as memory is concerned."""
