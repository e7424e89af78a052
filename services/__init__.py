"""The services: one folder per image, the same anatomy in each. They meet on the bus only."""
