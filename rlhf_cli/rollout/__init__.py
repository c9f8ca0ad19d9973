"""Prompts become responses: decoding options, the batched decoder, and rollouts."""
