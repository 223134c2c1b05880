"""DeiT of ImageNet's geometry on small images: `train` makes the models, `claims` tests the paper's claims on them.

RESULTS.md is what `claims` wrote.
"""
