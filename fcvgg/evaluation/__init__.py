"""How well a network does on labelled images, and what padding and windows do to its scores."""
