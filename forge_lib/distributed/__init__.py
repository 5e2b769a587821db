"""What the processes of a run send each other, and what they do when one of them fails."""
