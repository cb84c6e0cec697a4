"""cli-jax: vision-language models with Cross-Layer Injection, in JAX/Flax."""

__version__ = "0.1.0"
