"""KV-cache generation."""
