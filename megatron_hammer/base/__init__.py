"""What every other room uses and what knows none of them: errors, files, progress, command lines."""
