"""Options of the commands. What they run is imported when it is called: ``--help`` does not wait for PyTorch."""
