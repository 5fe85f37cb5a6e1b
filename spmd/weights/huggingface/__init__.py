"""Weights from and to Hugging Face: GPT-2 and Llama as safetensors."""
