"""A merged model as a GGUF file for the embedded engine: the Llama family, written with the official `gguf`."""
