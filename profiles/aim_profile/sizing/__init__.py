"""Does a model fit a device, by how much, and what would."""
