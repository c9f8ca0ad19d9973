"""What people, rewards and files say of responses, on its way to rows."""
