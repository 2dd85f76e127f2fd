"""What compressing costs in time, and what it gains."""
