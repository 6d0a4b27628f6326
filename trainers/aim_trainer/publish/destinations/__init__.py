"""Where versions go: a directory or S3, the Hugging Face hub, an OCI registry."""
