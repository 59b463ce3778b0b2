"""What the path of SGD looks like: pure functions, a file for each of the papers that they come from."""
