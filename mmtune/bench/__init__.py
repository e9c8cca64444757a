"""The measurements behind the numbers that the project states; each is a module to run."""
