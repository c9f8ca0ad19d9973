"""What ppo and grpo share: experience, critic, monitoring and alarms, refreshes."""
