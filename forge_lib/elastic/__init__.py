"""Training with peers that join and leave, on slow links: rounds of local steps, then one exchange of the changes."""
