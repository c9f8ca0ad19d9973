"""rlhf-cli: align a language model with feedback, one stage per command."""

__version__ = "0.1.0"
