"""Any-resolution images: tiles and the gather plan. Numpy and Pillow only."""
