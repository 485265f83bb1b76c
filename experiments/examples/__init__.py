"""A sharded MLP inside the modules of other libraries, each example a program of its own."""
