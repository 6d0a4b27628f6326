"""Base and tuned model are judged side by side, and gates decide."""
