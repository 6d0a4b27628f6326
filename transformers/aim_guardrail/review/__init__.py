"""What is learnt of policies while they serve: by those who say that a verdict was wrong, and by a candidate beside."""
