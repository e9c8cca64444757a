"""`mmtune list NAME`: a page for every method and editor, made of what the code says of itself."""
