"""What leaves the program: the model card beside a saved adapter, and adapters that replace a loaded one."""
