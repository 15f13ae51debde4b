"""NVAE, a deep hierarchical variational autoencoder (Vahdat & Kautz, NeurIPS 2020).

The mathematics alone: torch in, torch out. Needs nothing but torch.
"""
