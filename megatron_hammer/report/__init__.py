"""What a run did, as one page: figures that it has written, gathered, thinned and laid out for people."""
