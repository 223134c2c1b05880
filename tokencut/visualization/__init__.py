"""Figures and pictures of tokens."""
