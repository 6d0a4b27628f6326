"""What was decided about each request, in lines that cannot be changed unnoticed."""
