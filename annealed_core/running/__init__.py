"""Descriptions of experiments, running them, and keeping what they gave."""
