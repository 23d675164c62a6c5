"""MoBA inside Megatron-core transformer layers."""
