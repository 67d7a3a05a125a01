"""What leaves the program or comes back: saved adapters, their cards, combined and converted ones, unloaded models."""
