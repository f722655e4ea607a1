"""What the simulator costs, how true it is, and what it says of routing policies."""
