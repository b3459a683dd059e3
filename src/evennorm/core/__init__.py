"""State the mathematics once, with the array namespace passed in as xp."""
