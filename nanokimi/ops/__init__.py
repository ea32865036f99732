"""What the network and the optimizer compute with: each operation as a plain reference, then its fast versions."""
