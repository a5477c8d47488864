"""What the net is: its numbers, its columns, their crossings; knows no data and no training."""
