"""Files of strangers, opened in a process that can do nothing else."""
