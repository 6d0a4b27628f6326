"""The models this process knows: which are served, under which names, in which state."""
