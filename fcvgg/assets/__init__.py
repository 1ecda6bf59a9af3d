"""Files packaged with fcvgg: the demo net's weights and its test photograph."""
