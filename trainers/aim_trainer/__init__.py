"""Fine-tuning on Ray: LoRA, QLoRA and full, that survives, is judged, and comes out ready to serve."""
