"""What all other rooms use: errors, files, locks, progress, signals, tables, command lines. Imports no other room."""
