"""What is left of a protection once the world has handled the photo."""
