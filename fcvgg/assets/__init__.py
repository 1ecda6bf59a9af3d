"""The demo's weights and photograph."""
