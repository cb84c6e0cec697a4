"""Contrastive pretraining of the vision tower on pictures and their captions (SigLIP)."""
