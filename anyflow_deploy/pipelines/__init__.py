"""Prompts to latents to videos: the parts around an engine, in PyTorch.

The text encoder and the VAE are the checkpoint's own, run by transformers and diffusers; only the
transformer is replaced by an engine. A device that cannot hold a text encoder of 5.7 billion
parameters takes prompt embeddings from a file instead, and one without a VAE writes latents:
neither needs PyTorch.
"""
