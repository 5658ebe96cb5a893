"""The processes of a run: how they meet, agree and stop, and what they send."""
