"""How the processes of a run reach each other, and what they send."""
