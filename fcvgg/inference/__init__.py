"""How a network runs over large maps: layer by strip, block by block, in memory."""
