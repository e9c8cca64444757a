"""What an adapter or a fine-tune has learned: factors, spectra, decompositions, compression."""
