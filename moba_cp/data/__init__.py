"""Data: documents, tokenized files, and sequences packed from them."""
