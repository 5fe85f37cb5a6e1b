"""Weights from and to Hugging Face as safetensors: families of decoders, ResNet and ViT."""
