"""One MoBA layer over many devices."""
