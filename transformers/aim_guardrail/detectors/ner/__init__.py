"""Names of people, places and organizations, by spaCy."""
