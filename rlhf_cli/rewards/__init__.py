"""Where a reward comes from: a checkpoint or a rule. Every source scores a list of rollouts."""
