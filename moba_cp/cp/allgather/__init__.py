"""All K and V come to every rank, some heads at a time."""
