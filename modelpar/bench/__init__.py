"""Speed of one training step by several means."""
