"""Change the rules one operator at a time, and see whether a test notices."""
