"""What all other packages use: errors, files, locks, progress, signals, tables, command lines. Imports none of them."""
