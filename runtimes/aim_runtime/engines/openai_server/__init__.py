"""An engine that is somebody else's server: whatever speaks OpenAI's HTTP API, here or elsewhere."""
