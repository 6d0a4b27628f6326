"""The guardrail transformer: prompts and answers are checked on their way to and from any predictor."""
