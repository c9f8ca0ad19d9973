"""What every training stage shares: the optimizer step, the out folder, and the hand-off checks."""
