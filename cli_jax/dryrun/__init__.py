"""What a run will need, found by compiling its step for described chips."""
