"""Text files to documents, to a token store, to blocks of tokens, to each process's share of a batch."""
