"""Device meshes and logical axis rules."""
