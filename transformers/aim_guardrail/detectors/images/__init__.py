"""Pictures judged by an image classifier of one's own, from a Hugging Face directory, in ONNX Runtime."""
