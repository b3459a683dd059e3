"""The mathematics, stated once; the array namespace is passed in as xp."""
