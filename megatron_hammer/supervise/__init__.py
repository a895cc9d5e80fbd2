"""Starting the ranks of a run and watching them."""
