"""What surrounds the trainer's loop: hooks after each step, and watchdog, signals, launcher and rendezvous."""
