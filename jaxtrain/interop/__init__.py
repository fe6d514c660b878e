"""Other people's weights in, and weights for other people out: Hugging Face folders and GGUF files."""
