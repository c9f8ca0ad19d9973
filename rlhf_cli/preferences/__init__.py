"""What learning from judged responses without a reward model needs: items and their reference."""
