"""What was trained becomes what is served."""
