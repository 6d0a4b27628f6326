"""What a model needs and which partition of which GPU it gets: facts and decisions, no server, no torch."""
