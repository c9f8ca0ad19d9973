"""Models: loaded and saved as plain Hugging Face folders, and run without a [B, T, V] tensor."""
