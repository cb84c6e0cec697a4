"""Attention kernels of one accelerator each; `model/attention.py` chooses among them."""
