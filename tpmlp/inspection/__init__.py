"""Looking at what runs: the audit of a compiled program counts what it moves and what it holds."""
