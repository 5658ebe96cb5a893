"""Checks of the nodes before training, detection of slow ranks, and the watchdog."""
