"""Where the directions of an optimizer come from, when they are due, and how they are averaged."""
