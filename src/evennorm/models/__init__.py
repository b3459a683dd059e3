"""Describe models for the tools, whatever their framework: what layers they have, how to run parts of them, what folds."""
