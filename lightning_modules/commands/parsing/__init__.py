"""From words on a command line to options, and from what parsers say to one sentence."""
