"""How pictures become numbers: encoders, decoders, losses, refinement, painter, writer."""
