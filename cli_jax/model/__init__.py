"""Vision towers, projector, decoder, and the model that joins them."""
