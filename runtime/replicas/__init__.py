"""Several copies of the server behind one address, on Ray Serve: one machine or many."""
