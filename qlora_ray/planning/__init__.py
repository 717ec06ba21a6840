"""What will be done, derived once and before anything starts: steps, memory, speed, the DeepSpeed config."""
