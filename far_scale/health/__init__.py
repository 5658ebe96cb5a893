"""What keeps a run going: stop signals, the guard against bad steps, the watchdog, the check of the nodes."""
