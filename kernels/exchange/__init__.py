"""The integer kernels that plan the exchange: counting, deciding, requesting."""
