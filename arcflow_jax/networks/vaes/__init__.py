"""VAEs: `vae` is what they share, the others are one kind each. May import what networks may."""
