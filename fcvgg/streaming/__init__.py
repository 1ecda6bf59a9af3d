"""Score maps of images of any size, in bounded memory: strips of rows through line buffers."""
