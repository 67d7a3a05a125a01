"""The demo: the whole method on a real 135M model and real text, from packages that pip installs."""
