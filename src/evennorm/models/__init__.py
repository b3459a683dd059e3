"""Describe models for the tools, whatever their framework: their layers, how to run parts of them, and what can be
folded."""
