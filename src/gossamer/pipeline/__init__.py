"""From a model's name to a picture: options, loading, denoising, and the settings that a picture carries."""
