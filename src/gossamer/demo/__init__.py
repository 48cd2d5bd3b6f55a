"""The embedded model's world: scenes, their renderer, captions, the scene reader, and where the files are."""
