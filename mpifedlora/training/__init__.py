"""The model, and what one client does with it."""
