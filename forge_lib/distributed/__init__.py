"""What the processes of a run tell each other, and what they do when one of them fails."""
