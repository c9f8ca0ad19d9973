"""What people look at: runs as pages, in a terminal, and in talk."""
