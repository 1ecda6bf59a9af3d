"""What every part may use and none is about: files, progress, extras, module state."""
