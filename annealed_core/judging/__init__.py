"""Judging: how good a trained chain is on a density, and an auto-encoder on images."""
