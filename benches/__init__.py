"""Speed and memory against the libraries that one would use instead; never part of a test's verdict."""
