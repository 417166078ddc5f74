"""The world of the bundled model: scenes, their captions, their pixels, and a reader that gets them back."""
