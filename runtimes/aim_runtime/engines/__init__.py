"""Engines: what turns an OpenAI body into tokens. Each engine's library is imported in its own module only."""
