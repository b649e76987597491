"""What goes past the paper. Programs import from here; the core files never do, but generate.py."""
