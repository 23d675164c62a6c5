"""The language model's shape, its attention by layer and by time, its rotary frequencies and its loss; no Megatron."""
