"""The output directory: header first, regions as they come, checked, published by a rename."""
