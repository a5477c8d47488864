"""What runs show when they are held against each other."""
